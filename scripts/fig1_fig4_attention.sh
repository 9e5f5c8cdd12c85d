#!/usr/bin/env bash
# Fig. 1 and Fig. 4: attention maps of ImageNet-1K's ViT-S/16, without and with SAR, side by side, and what is left of them
# when 60 % of the mass is kept.
#
#   DATA=/data bash scripts/fig1_fig4_attention.sh        # trains Table 4's two rows first, or takes them if finished
#   DATA=/data CKPT_BASE=vit.pth CKPT_SAR=sar.pth bash scripts/fig1_fig4_attention.sh        # of weights you have
#   CKPT_OPTIONS="--num-heads 6 --checkpoint-key ema" beside them: what your files do not tell of themselves
#   IMAGES=mine COUNT=20 bash scripts/fig1_fig4_attention.sh        # of a folder of images (DATA/imagenet/val)
#   DRY_RUN=1 bash scripts/fig1_fig4_attention.sh        # the commands and what they cost
#
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. Pictures
#   need no GPU.
# Time: about 28 hours on it (our estimate; the paper names no hours), nothing once Table 4 is done; then a minute.
# Expected: with SAR fewer and larger blobs, on the objects. The pictures are in OUT/fig1_fig4/maps/seed0.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/trained_weights.sh
images=${IMAGES:-data:imagenet/val}
[ "${SMOKE:-}" = 1 ] && images=data:imagenet/val

rows() {
    in1k_rows
    models="--checkpoint $base --name ViT-S/16 --checkpoint $sar --name 'ViT-S/16 + SAR'"
    given=${given_base:-$given_sar}
    echo "maps  figures$given/vit_small  analysis.figures --images $(quote "$images") --count $(quote "${COUNT:-12}") $models"
}
exec bash scripts/run_table.sh fig1_fig4 < <(rows)
