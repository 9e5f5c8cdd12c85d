#!/usr/bin/env bash
# Table 4: ImageNet-1K, 300 epochs, with dense relative localisation (DRLoc) for comparison and, which the paper leaves
# for later, together with it; and the ViT-T/16 of the paper's first version.
#
#   bash scripts/table4_imagenet1k.sh --data /data
#   bash scripts/table4_imagenet1k.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1: ViT-S/16 79.8 (quoted by the paper), with DRLoc 80.2, with SAR 80.7; with both there is no number.
#   ViT-T/16 72.2, with SAR 72.4. DRLoc's weight on a ViT is not in the paper: 0.1 is a guess.
# Options: bash scripts/table4_imagenet1k.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table4 "$@"
