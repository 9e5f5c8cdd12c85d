#!/usr/bin/env bash
# Table 9: ImageNet-100, 100 epochs: SAR on T2T-ViT-14, PVT-Small and CvT-13, each by its own authors' protocol, beside ViT-S/16.
# Where the paper's text and an official code differ, the code's recipe is taken; the other is recipes/*_in1k_paper.args.
#
#   DATA=/data bash scripts/table9_imagenet100_hybrids.sh
#   DRY_RUN=1 bash scripts/table9_imagenet100_hybrids.sh        # the commands and what they cost
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: about 3.6 hours on it (our estimate; the paper names no hours).
# Expected, top-1:
#   ViT-S/16 74.22, with SAR 76.72; T2T-ViT-14 82.42, 83.96; PVT-Small 76.57, 77.78; CvT-13 83.38, 85.2.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
exec bash "$(dirname "$0")/run_table.sh" table9 <<'ROWS'
# row           run                           arguments
vit_small       in100_100/vit_small           @recipes/swin_in100_100.args --model vit_small
vit_small_sar   in100_100/vit_small_sar       @recipes/swin_in100_100.args --model vit_small_sar
t2t_vit_14      t2t_in100/t2t_vit_14          @recipes/t2t_in100.args --model t2t_vit_14
t2t_vit_14_sar  t2t_in100/t2t_vit_14_sar      @recipes/t2t_in100.args --model t2t_vit_14_sar
pvt_small       pvt_in100/pvt_small           @recipes/pvt_in100.args --model pvt_small
pvt_small_sar   pvt_in100/pvt_small_sar       @recipes/pvt_in100.args --model pvt_small_sar
cvt_13          cvt_in100/cvt_13              @recipes/cvt_in100.args --model cvt_13
cvt_13_sar      cvt_in100/cvt_13_sar          @recipes/cvt_in100.args --model cvt_13_sar
ROWS
