#!/usr/bin/env bash
# Table 8: ImageNet-1K's ViT-S/16 without and with SAR on images unlike the training's: ImageNet-A, ImageNet-C.
#
#   DATA=/data bash scripts/table8_robustness.sh        # trains Table 4's two rows first, or takes them if finished
#   DATA=/data CKPT_BASE=vit.pth CKPT_SAR=sar.pth bash scripts/table8_robustness.sh        # of weights you have
#   CKPT_OPTIONS="--num-heads 6 --checkpoint-key ema" beside them: what your files do not tell of themselves
#   DRY_RUN=1 bash scripts/table8_robustness.sh        # the commands and what they cost
#
# DATA/imagenet-a is <wnid>/*; DATA/imagenet-c is <corruption>/<severity>/<wnid>/*, its tars' groups (noise/...) or not.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. What is
#   measured takes one GPU.
# Time: about 28 hours on it (our estimate; the paper names no hours), nothing once Table 4 is done; then 4.8 million
#   images of ImageNet-C a model, as fast as the CPUs decode them. It goes on where it was stopped.
# Expected: ImageNet-A, top-1 over its 200 classes, 19.2 and with SAR 22.39; ImageNet-C, mCE (lower is better), 52.8 and
#   with SAR 51.6.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/trained_weights.sh

rows() {
    in1k_rows
    for set in a c; do
        measured="analysis.robustness --data-set imagenet-$set --data-path data:imagenet-$set"
        echo "in_${set}_vit_small      imagenet_$set$given_base/vit_small     $measured --checkpoint $base"
        echo "in_${set}_vit_small_sar  imagenet_$set$given_sar/vit_small_sar  $measured --checkpoint $sar"
    done
}
exec bash scripts/run_table.sh table8 < <(rows)
