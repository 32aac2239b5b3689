#!/usr/bin/env bash
# Downloads the images of Conceptual Captions 3M and writes image-caption pairs as tar shards.
#
#     pipx install img2dataset
#     launch/prepare_cc3m.sh Train_GCC-training.tsv cc3m
#
# The first argument is the list from https://ai.google.com/research/ConceptualCaptions/download, which has a caption,
# a tab and a URL in each line. When the script is started again, it keeps the complete shards. With DRY_RUN=1 the
# command is printed and not run.
set -euo pipefail
list=${1:?expected the list, Train_GCC-training.tsv} folder=${2:?expected the folder for the shards}

# Resizes the shorter side to 256 pixels, for random crops of 224. Smaller images keep their size.
command=(img2dataset --url_list "$folder/list.tsv" --input_format tsv --url_col url --caption_col caption
    --output_folder "$folder" --output_format webdataset --number_sample_per_shard 10000
    --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True --encode_quality 90
    --processes_count "$(nproc)" --thread_count 64 --retries 1
    --user_agent_token img2dataset)
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi

mkdir -p "$folder"
{ printf 'caption\turl\n' && cat "$list"; } > "$folder/list.tsv"
"${command[@]}"

python3 - "$folder" <<'END'
import collections, json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
stats = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*_stats.json"))]
reasons = collections.Counter()
for shard in stats:
    reasons.update(shard["status_dict"])
listed, pairs = (sum(shard[name] for shard in stats) for name in ("count", "successes"))
summary = {"shards": len(stats), "listed": listed, "pairs": pairs, "reasons": dict(reasons.most_common(20))}
(folder / "pairs.txt").write_text(json.dumps(summary, indent=1) + "\n")
print(f"{len(stats)} shards with {pairs} pairs, of {listed} URLs")
END

# Expect 332 shards FOLDER/{00000..00331}.tar of about 60 GB in total, after one or two hours on 16 cores and 2 Gbit/s.
# FOLDER/pairs.txt counts the pairs and the reasons of failures: fewer of the 3,318,333 URLs work every year.
