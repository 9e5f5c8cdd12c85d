#!/usr/bin/env bash
# Table 11: attention maps of ImageNet-1K's ViT-S/16, without and with SAR, against PASCAL VOC 2012's masks.
#
#   bash scripts/table11_jaccard.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/table11_jaccard.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # of weights you have
#     with --ckpt-options "--num-heads 6 --checkpoint-key ema" for what your files do not tell of themselves
#   bash scripts/table11_jaccard.sh --dry-run        # the commands and the number of images
#
# In --data, VOCdevkit is VOC 2012's: 1,449 validation images. Each model is measured twice: as the paper's code
# does it, with void pixels in the union, and with void really left out, for which the paper has no number.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. What is
#   measured takes one GPU.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Once Table 4's runs are finished, only the maps are measured.
# Expected, Jaccard similarity (%) by the paper's code: ViT-S/16 19.18, with SAR 31.19.
# Options: bash scripts/table11_jaccard.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table11 "$@"
