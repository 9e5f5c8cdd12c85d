#!/usr/bin/env bash
# Table 2: small sets from scratch (Stanford Cars; DomainNet's Clipart, Painting, Sketch; 5,000 epochs).
# All numbers of the protocol but the epochs are a guess: see recipes/small_sets.args.
#
#   bash scripts/table2_small_datasets.sh --data /data
#   bash scripts/table2_small_datasets.sh --dry-run        # the commands and the number of images
#   bash scripts/table2_small_datasets.sh --overrides cached.args        # cached.args: --cache-images, given the memory
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Decoding may take longer; --cache-images saves it.
# Expected, top-1 of ViT-S/16 (which the paper quotes from El-Nouby et al., 2021) and with SAR:
#   Cars 35.3 and 64.65, Clipart 41.0 and 64.95, Painting 38.4 and 57.11, Sketch 37.2 and 62.98.
# Options: bash scripts/table2_small_datasets.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table2 "$@"
