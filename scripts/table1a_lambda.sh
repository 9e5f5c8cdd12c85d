#!/usr/bin/env bash
# Table 1(a): lambda, the weight of the spatial entropy, on the paper's last block (ImageNet-100, 100 epochs).
#
#   DATA=/data bash scripts/table1a_lambda.sh
#   DRY_RUN=1 bash scripts/table1a_lambda.sh        # the commands and what they cost
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: about 2.7 hours on it (our estimate; the paper names no hours).
# Expected: top-1 75.72, 75.82, 76.16, 76.72, 76.22, 75.88 for lambda 0, 0.001, 0.005, 0.01, 0.05, 0.1.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
exec bash "$(dirname "$0")/run_table.sh" table1a <<'ROWS'
# row  run                                     arguments
0      in100_100/vit_small_sar_lambda0         @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0
0.001  in100_100/vit_small_sar_lambda0.001     @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0.001
0.005  in100_100/vit_small_sar_lambda0.005     @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0.005
0.01   in100_100/vit_small_sar                 @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0.01
0.05   in100_100/vit_small_sar_lambda0.05      @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0.05
0.1    in100_100/vit_small_sar_lambda0.1       @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0.1
ROWS
