"""Analysis of trained models: attention maps, their measures, and robustness."""
