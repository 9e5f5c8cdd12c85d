#!/usr/bin/env bash
# Table 11: attention maps of ImageNet-1K's ViT-S/16, without and with SAR, against PASCAL VOC 2012's masks.
#
#   DATA=/data bash scripts/table11_jaccard.sh        # trains Table 4's two rows first, or takes them if finished
#   DATA=/data CKPT_BASE=vit.pth CKPT_SAR=sar.pth bash scripts/table11_jaccard.sh        # of weights you have
#   CKPT_OPTIONS="--num-heads 6 --checkpoint-key ema" beside them: what your files do not tell of themselves
#   DRY_RUN=1 bash scripts/table11_jaccard.sh        # the commands and what they cost
#
# DATA/VOCdevkit is VOC 2012's, 1,449 validation images. Each model is measured twice: as the paper's code does it, with
# void pixels in the union, and with void really left out, for which the paper has no number.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide. What is
#   measured takes one GPU.
# Time: about 28 hours on it (our estimate; the paper names no hours), nothing once Table 4 is done; then minutes.
# Expected, Jaccard similarity (%) by the paper's code: ViT-S/16 19.18, with SAR 31.19.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/trained_weights.sh
size=480
[ "${SMOKE:-}" = 1 ] && size=40

rows() {
    in1k_rows
    for protocol in paper-code void-excluded; do
        measured="analysis.jaccard --data-path data:VOCdevkit --input-size $size --protocol $protocol"
        suffix=$([ $protocol = paper-code ] || echo _void_excluded)
        echo "vit_small$suffix      jaccard$given_base/vit_small$suffix     $measured --name ViT-S/16 --checkpoint $base"
        echo "vit_small_sar$suffix  jaccard$given_sar/vit_small_sar$suffix  $measured --name 'ViT-S/16 + SAR' --checkpoint $sar"
    done
}
exec bash scripts/run_table.sh table11 < <(rows)
