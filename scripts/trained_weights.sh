# Table 4's two ViT-S/16, or the weights in CKPT_BASE and CKPT_SAR; the scripts that go on from them source this.
#   base, sar              checkpoint.pth of each, as words of a row
#   given_base, given_sar  what to put behind the name of a run that goes on from your weights: it is another run
#   in1k_rows              prints the rows that train them where they are needed
for variable in CKPT_BASE CKPT_SAR; do
    if [ -n "${!variable:-}" ] && [ ! -f "${!variable}" ]; then
        echo "error: $variable=${!variable}: no such file (paths are seen from the repository)" >&2
        exit 2
    fi
done
base=${CKPT_BASE:-run:in1k/vit_small/checkpoint.pth}
sar=${CKPT_SAR:-run:in1k/vit_small_sar/checkpoint.pth}
given_base=${CKPT_BASE:+_given}
given_sar=${CKPT_SAR:+_given}

in1k_rows() {
    echo "- in1k/vit_small      @recipes/deit_in1k.args --model vit_small"
    echo "- in1k/vit_small_sar  @recipes/deit_in1k.args --model vit_small_sar"
}
