"""Looking at what a trained model attends to."""
