#!/usr/bin/env bash
# Table 3: a share of ImageNet-100's training images (100 epochs). The paper draws the images of a share at random;
# here they are drawn class by class, and smaller shares lie inside larger ones.
#
#   DATA=/data bash scripts/table3_sampling.sh
#   DRY_RUN=1 bash scripts/table3_sampling.sh        # the commands and what they cost
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: about 2.3 hours on it (our estimate; the paper names no hours).
# Expected, top-1 on 0.25, 0.50, 0.75 and all of the images:
#   ViT-S/16 21.66, 29.86, 35.62, 74.22; with SAR 29.06, 38.02, 46.12, 76.72.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
exec bash "$(dirname "$0")/run_table.sh" table3 <<'ROWS'
# row               run                                   arguments
0.25_vit_small      in100_100/vit_small_sampling0.25      @recipes/swin_in100_100.args --model vit_small --sampling-ratio 0.25
0.25_vit_small_sar  in100_100/vit_small_sar_sampling0.25  @recipes/swin_in100_100.args --model vit_small_sar --sampling-ratio 0.25
0.50_vit_small      in100_100/vit_small_sampling0.50      @recipes/swin_in100_100.args --model vit_small --sampling-ratio 0.50
0.50_vit_small_sar  in100_100/vit_small_sar_sampling0.50  @recipes/swin_in100_100.args --model vit_small_sar --sampling-ratio 0.50
0.75_vit_small      in100_100/vit_small_sampling0.75      @recipes/swin_in100_100.args --model vit_small --sampling-ratio 0.75
0.75_vit_small_sar  in100_100/vit_small_sar_sampling0.75  @recipes/swin_in100_100.args --model vit_small_sar --sampling-ratio 0.75
1.00_vit_small      in100_100/vit_small                   @recipes/swin_in100_100.args --model vit_small
1.00_vit_small_sar  in100_100/vit_small_sar               @recipes/swin_in100_100.args --model vit_small_sar
ROWS
