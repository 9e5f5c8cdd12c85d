#!/usr/bin/env bash
# Table 12: MoCo-v3 and DINO without and with SAR on ImageNet-100, 300 epochs; a linear probe of each, and its attention
# maps against PASCAL VOC 2012's masks.
#
#   bash scripts/table12_selfsupervised.sh --data /data --seeds 0 1 2
#   bash scripts/table12_selfsupervised.sh --data /data --rows accuracy_dino accuracy_dino_sar        # half of it
#   bash scripts/table12_selfsupervised.sh --dry-run        # the commands and the number of images
#   bash scripts/table12_selfsupervised.sh --smoke        # the same, tiny, on scanned digits
#
# In --data, imagenet is ImageNet-1K, of which 100 classes are taken, and VOCdevkit is VOC 2012's: 1,449 validation
# images. Of each run checkpoint.pth is taken, the last epoch: DINO's teacher and MoCo-v3's base encoder.
# Hardware: the paper's is 8 x V100 32 GB. MoCo-v3 does not accumulate: its 1,024 images are shared by all processes, so
#   fewer GPUs need more memory. DINO's 512 accumulate. What is measured takes one GPU.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   An image costs MoCo-v3 2.7 and DINO 4.5 times what it costs supervised training.
# Expected, linear top-1 accuracy: MoCo-v3 77.6, with SAR 78.88; DINO 77.42, with SAR 79.9. Jaccard similarity (%):
#   MoCo-v3 27.4, with SAR 33.1 (the paper prints +6.17 for it); DINO 35.06, with SAR 35.28.
# Options: bash scripts/table12_selfsupervised.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table12 "$@"
