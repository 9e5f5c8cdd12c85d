#!/usr/bin/env bash
# Table 8: ImageNet-1K's ViT-S/16 without and with SAR on images unlike the training's: ImageNet-A, ImageNet-C.
#
#   bash scripts/table8_robustness.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/table8_robustness.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # of weights you have
#     with --ckpt-options "--num-heads 6 --checkpoint-key ema" for what your files do not tell of themselves
#   bash scripts/table8_robustness.sh --dry-run        # the commands and the number of images
#
# In --data, imagenet-a is <wnid>/*, and imagenet-c is <corruption>/<severity>/<wnid>/*, in its tars' groups or not.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. What is
#   measured takes one GPU.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Once Table 4's runs are finished, 4.8 million images of ImageNet-C a model are left, as fast as the CPUs decode
#   them. It goes on where it was stopped.
# Expected: ImageNet-A, top-1 over its 200 classes, 19.2 and with SAR 22.39; ImageNet-C, mCE (lower is better), 52.8 and
#   with SAR 51.6.
# Options: bash scripts/table8_robustness.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table8 "$@"
