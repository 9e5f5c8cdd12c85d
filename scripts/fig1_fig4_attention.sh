#!/usr/bin/env bash
# Fig. 1 and Fig. 4: attention maps of ImageNet-1K's ViT-S/16, without and with SAR, side by side, and what is left of
# them when 60 % of the mass is kept.
#
#   bash scripts/fig1_fig4_attention.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/fig1_fig4_attention.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # of weights you have
#     with --ckpt-options "--num-heads 6 --checkpoint-key ema" for what your files do not tell of themselves
#   bash scripts/fig1_fig4_attention.sh --images mine --count 20        # of images in another folder than imagenet/val
#   bash scripts/fig1_fig4_attention.sh --dry-run        # the commands and the number of images
#
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. Pictures
#   need no GPU.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Once Table 4's runs are finished, only the pictures are drawn.
# Expected: with SAR fewer and larger blobs, on the objects. The pictures are in output/fig1_fig4/maps/seed0.
# Options: bash scripts/fig1_fig4_attention.sh --help.
exec bash "$(dirname "$0")/run_table.sh" fig1_fig4 "$@"
