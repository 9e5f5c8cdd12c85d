#!/usr/bin/env bash
# Table 7: ImageNet-1K weights fine-tuned on CIFAR-10, CIFAR-100, Flowers and Pets (224 px, 100 epochs), with SAR or
# not in pre-training and in fine-tuning. The last block stays the pre-training's (appendix E.4): with SAR in
# fine-tuning alone it is the standard one with lambda 0.01, with SAR in pre-training alone the paper's with lambda 0.
#
#   DATA=/data bash scripts/table7_finetuning.sh        # trains Table 4's two rows first, or takes them if finished
#   DATA=/data CKPT_BASE=vit.pth CKPT_SAR=sar.pth bash scripts/table7_finetuning.sh        # from weights you have
#   CKPT_OPTIONS="--checkpoint-key ema" beside them: which weights of your files
#   DRY_RUN=1 bash scripts/table7_finetuning.sh        # the commands and what they cost
#
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as DeiT does: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: about 29 hours on it, nearly all of it Table 4's; the fine-tuning alone about 1.5 hours (our
#   estimates; the paper names no hours).
# Expected, top-1 on CIFAR-10, CIFAR-100, Flowers, Pets, by SAR in pre-training - in fine-tuning:
#   no-no 98.59, 88.95, 95.07, 92.21; yes-no 98.69, 89.19, 96.05, 92.7;
#   no-yes 98.72, 88.95, 95.1, 92.34; yes-yes 98.65, 89.21, 96.1, 92.7.
# Settings (DATA, OUT, SEEDS, ROWS, LAUNCH, OVERRIDES, DRY_RUN, SMOKE): paper/run.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/trained_weights.sh

rows() {
    in1k_rows
    for set in cifar10 cifar100 flowers pets; do
        tuned="@recipes/finetune.args --data-set $set"
        echo "no-no_$set    finetune$given_base/no-no_$set   $tuned --model vit_small     --finetune $base"
        echo "yes-no_$set   finetune$given_sar/yes-no_$set   $tuned --model vit_small     --finetune $sar"
        echo "no-yes_$set   finetune$given_base/no-yes_$set  $tuned --model vit_small_sar --finetune $base"
        echo "yes-yes_$set  finetune$given_sar/yes-yes_$set  $tuned --model vit_small_sar --finetune $sar"
    done
}
exec bash scripts/run_table.sh table7 < <(rows)
