#!/usr/bin/env bash
# Fig. 6 and Fig. 7: attention maps of MoCo-v3's and DINO's ViT-S/16, without and with SAR, side by side.
#
#   bash scripts/fig6_fig7_attention.sh --data /data        # trains Table 12's four models first, or takes them
#   bash scripts/fig6_fig7_attention.sh --data /data --images mine --count 20        # of images in another folder
#   bash scripts/fig6_fig7_attention.sh --dry-run        # the commands and the number of images
#
# Of Table 12's runs checkpoint.pth is taken, the last epoch: DINO's teacher and MoCo-v3's base encoder.
# Hardware: the paper's is 8 x V100 32 GB; see table12_selfsupervised.sh. Pictures need no GPU.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Once Table 12's runs are finished, only the pictures are drawn.
# Expected: with SAR MoCo-v3's maps are less disordered, and DINO's heads differ more from each other. The pictures are in output/fig6_fig7/maps/seed0.
# Options: bash scripts/fig6_fig7_attention.sh --help.
exec bash "$(dirname "$0")/run_table.sh" fig6_fig7 "$@"
