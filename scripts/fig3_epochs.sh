#!/usr/bin/env bash
# Fig. 3: accuracy against epochs on ImageNet-1K, without and with SAR. The runs are Table 4's; the report draws them.
#
#   bash scripts/fig3_epochs.sh --data /data
#   bash scripts/fig3_epochs.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Once Table 4's runs are finished, nothing is trained.
# Expected, top-1: SAR at epoch 100 is where ViT-S/16 is at 150, has 79.9 at epoch 250 and 80.7 at 300; ViT-S/16 ends at
#   79.8. The curves are in output/fig3/fig3.png.
# Options: bash scripts/fig3_epochs.sh --help.
exec bash "$(dirname "$0")/run_table.sh" fig3 "$@"
