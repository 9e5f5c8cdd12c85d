# Table 4's two ViT-S/16, or the weights in CKPT_BASE and CKPT_SAR; the scripts that go on from them source this.
#   base, sar              checkpoint.pth of each, or your weights and CKPT_OPTIONS, as words of a row
#   given_base, given_sar  what to put behind the name of a run that goes on from your weights: it is another run
#   in1k_rows              prints the rows that train them where they are needed
#   quote WORD             prints it as one word of a row, whatever is in it
for variable in CKPT_BASE CKPT_SAR; do
    if [ -n "${!variable:-}" ] && [ ! -f "${!variable}" ]; then
        echo "error: $variable=${!variable}: no such file (paths are seen from the repository)" >&2
        exit 2
    fi
done
if [ -n "${CKPT_OPTIONS:-}" ] && [ -z "${CKPT_BASE:-}${CKPT_SAR:-}" ]; then
    echo "error: CKPT_OPTIONS=$CKPT_OPTIONS: there is no CKPT_BASE or CKPT_SAR that it is of" >&2
    exit 2
fi

quote() { # printf %q would write $'...' for what the locale does not know, which Python's shlex does not read
    printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"
}
base=$(quote "${CKPT_BASE:-run:in1k/vit_small/checkpoint.pth}")${CKPT_BASE:+ ${CKPT_OPTIONS:-}}
sar=$(quote "${CKPT_SAR:-run:in1k/vit_small_sar/checkpoint.pth}")${CKPT_SAR:+ ${CKPT_OPTIONS:-}}
given_base=${CKPT_BASE:+_given}
given_sar=${CKPT_SAR:+_given}

in1k_rows() {
    echo "- in1k/vit_small      @recipes/deit_in1k.args --model vit_small"
    echo "- in1k/vit_small_sar  @recipes/deit_in1k.args --model vit_small_sar"
}
