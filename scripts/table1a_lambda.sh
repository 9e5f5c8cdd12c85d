#!/usr/bin/env bash
# Table 1(a): lambda, the weight of the spatial entropy, on the paper's last block (ImageNet-100, 100 epochs).
#
#   bash scripts/table1a_lambda.sh --data /data
#   bash scripts/table1a_lambda.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected: top-1 75.72, 75.82, 76.16, 76.72, 76.22, 75.88 for lambda 0, 0.001, 0.005, 0.01, 0.05, 0.1.
# Options: bash scripts/table1a_lambda.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table1a "$@"
