#!/usr/bin/env bash
# Table 1(b): the parts of SAR, one by one (ImageNet-100, 100 epochs).
#
#   DATA=/data bash scripts/table1b_components.sh
#   DRY_RUN=1 bash scripts/table1b_components.sh        # the commands and what they cost
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: about 2.7 hours on it (our estimate; the paper names no hours).
# Expected, top-1:
#   A  ViT-S/16                        74.22
#   B  A without the MSA skip          74.64
#   C  B without the second LayerNorm  75.72
#   D  C without the MLP skip          73.76
#   E  A + spatial entropy             74.78
#   F  C + spatial entropy, i.e. SAR   76.72
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
exec bash "$(dirname "$0")/run_table.sh" table1b <<'ROWS'
# row  run                                     arguments
A      in100_100/vit_small                     @recipes/swin_in100_100.args --model vit_small
B      in100_100/vit_small_no_msa_skip         @recipes/swin_in100_100.args --model vit_small --last-block no_msa_skip
C      in100_100/vit_small_sar_lambda0         @recipes/swin_in100_100.args --model vit_small_sar --sar-weight 0
D      in100_100/vit_small_no_skips            @recipes/swin_in100_100.args --model vit_small --last-block no_skips
E      in100_100/vit_small_lambda0.01          @recipes/swin_in100_100.args --model vit_small --sar-weight 0.01
F      in100_100/vit_small_sar                 @recipes/swin_in100_100.args --model vit_small_sar
ROWS
