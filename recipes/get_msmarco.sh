#!/usr/bin/env bash
# Download MS MARCO passage ranking (and document ranking) and TREC Deep Learning 2019 and 2020 from their official
# servers, and check the MD5 sum of every download and the line count of every file.
#
#     bash recipes/get_msmarco.sh [OUT] [--titles] [--bm25_negatives] [--triples] [--id_triples] [--documents]
#     bash recipes/get_msmarco.sh [OUT] --check            only counts the lines of the files that are there
#
# OUT                default data/msmarco
# --titles           also the titles of the passages, as RocketQA made them. OUT/corpus.tsv has both: pid TAB title TAB
#                    text
# --bm25_negatives   the official BM25 triples (2 GB) as OUT/train.negatives.tsv, qid TAB pid,pid,... To use them:
#                    mine_negatives.py --run OUT/train.negatives.tsv
# --triples          a tenth of them as texts, for the warm-up of ANCE (8 GB, unpacked 27): OUT/triples.train.small.tsv
# --id_triples       all of them as ids (2 GB, unpacked 6): OUT/triples.train.ids.tsv, qid TAB positive pid TAB
#                    negative pid
# --documents        also document ranking (8 GB, unpacked 22): OUT/documents, with the same file names as the passages
#
# Licence: MS MARCO is for non-commercial research only; the terms are on https://microsoft.github.io/msmarco/. The
# judgments of TREC are in the public domain. If you download the files, you accept the terms.
# This script has not been tried: it was written without access to these servers. Addresses and member names are those
# of the project pages. If a server does not answer, or a file has another number of lines than expected, the script
# stops and names it. To continue, give the same command again.
# The counts of the triples and of the documents are from the project pages and, counted from the files, from the
# metadata of ir_datasets. The two agree, except for the judgments of the documents of train and dev: ir_datasets has
# one per query (367,013 and 5,193, used here); the pages have 384,597 and 5,478. The pages do not list
# 2020qrels-docs.txt. The member name in triples.train.small.tar.gz is verified nowhere.
# The MD5 sums are in recipes/get_msmarco.md5. They are those of ir_datasets (ir_datasets/etc/downloads.json; of
# msmarco-docs.tsv.gz those of Anserini's pages), as Microsoft publishes none. No sum is known of RocketQA's marco.tar.gz,
# which --titles takes: it is used unchecked, and the script says so.
set -euo pipefail
out=data/msmarco titles="" negatives="" triples="" id_triples="" documents="" check=""
for argument in "$@"; do
    case $argument in
        --titles) titles=1 ;;
        --bm25_negatives) negatives=1 ;;
        --triples) triples=1 ;;
        --id_triples) id_triples=1 ;;
        --documents) documents=1 ;;
        --check) check=1 ;;
        -*) sed -n '5,6p' "$0" >&2; exit 1 ;;
        *) out=$argument ;;
    esac
done
case $out in /*) ;; *) out=$PWD/$out ;; esac # awk takes a relative path with "=" for an assignment, tar "a:b" for a host
sums=$(dirname "${BASH_SOURCE[0]}")/get_msmarco.md5
marco=https://msmarco.z22.web.core.windows.net/msmarcoranking # the old address, msmarco.blob.core.windows.net, is dead
trec=https://trec.nist.gov/data/deep
rocketqa=https://rocketqa.bj.bcebos.com/corpus/marco.tar.gz

stop() { echo "get_msmarco: $*" >&2; exit 1; }

have() { # FILE LINES: whether the file is there; stops if it has another number of lines
    [ -f "$out/$1" ] || return 1
    local found
    found=$(LC_ALL=C grep -ac '' "$out/$1" || true) # unlike wc it counts a last line without its newline
    [ "$found" = "$2" ] ||
        stop "$out/$1: $found lines, not $2 — remove it and try again; if it happens again, its source has changed"
    echo "$out/$1: $2 lines"
}

md5() { # FILE: prints its MD5 sum
    if command -v md5sum >/dev/null; then md5sum <"$1" | cut -d ' ' -f 1; else command md5 -q "$1"; fi
}

fetch() { # URL: prints the path of the downloaded file, with its MD5 sum checked; continues a download that broke off
    local name=$out/download/${1##*/} wanted found
    if [ ! -f "$name" ]; then
        echo "fetching $1" >&2
        curl -fL --retry 3 -C - -o "$name.part" "$1" >&2 ||
            stop "$1 does not answer — see https://microsoft.github.io/msmarco/Datasets"
        mv "$name.part" "$name"
    fi
    wanted=$(awk -v name="${1##*/}" '$2 == name { print $1 }' "$sums")
    if [ -z "$wanted" ]; then
        echo "note: $name: no MD5 sum of this file is known, so it is not checked" >&2
    else
        found=$(md5 "$name")
        [ "$found" = "$wanted" ] || stop "$name: its MD5 sum is $found, not $wanted — remove it and try again; if it" \
            "happens again, its source has changed"
    fi
    echo "$name"
}

member() { # URL MEMBER: prints a file of an archive
    local archive
    archive=$(fetch "$1")
    tar -xzOf "$archive" "$2" || stop "$archive: no member $2 — its contents have changed"
}

unpacked() { # URL: prints a gzipped file
    local file
    file=$(fetch "$1")
    gzip -dc "$file"
}

plain() { # URL: prints a file
    local file
    file=$(fetch "$1")
    cat "$file"
}

judged() { # prints the queries of train that have a judgment, of 808,731 in all
    member $marco/collectionandqueries.tar.gz queries.train.tsv |
        awk -F '\t' 'NR == FNR { judged[$1]; next } $1 in judged' "$out/qrels.train.tsv" -
}

joined() { # prints pid TAB title TAB text
    local file
    file=$(fetch $rocketqa)
    tar -xzOf "$file" marco/para.title.txt >"$out/titles.tsv" ||
        stop "$file: no member marco/para.title.txt — its contents have changed"
    awk -F '\t' 'NR == FNR { title[$1] = $2; next } { print $1 "\t" title[$1] "\t" $2 }' \
        "$out/titles.tsv" "$out/collection.tsv"
}

ids() { # prints qid TAB positive TAB negative
    unpacked $marco/qidpidtriples.train.full.2.tsv.gz | tr -d '\r'
}

negatives() { # prints qid TAB pid,pid,... of these triples, in which the lines of a query are neighbours
    ids | awk -F '\t' '$1 == last { printf ",%s", $3; next }
        { if (last) print ""; printf "%s\t%s", $1, $3; last = $1 }
        END { print "" }'
}

make() { # FILE LINES COMMAND...: writes the output of the command to the file, unless the file is there
    if have "$1" "$2"; then return; fi
    [ -z "$check" ] || { echo "$out/$1: not there"; return; }
    mkdir -p "$out/download" "$(dirname "$out/$1")"
    "${@:3}" >"$out/$1.part"
    mv "$out/$1.part" "$out/$1"
    have "$1" "$2"
}

make collection.tsv 8841823 member $marco/collectionandqueries.tar.gz collection.tsv
make qrels.train.tsv 532761 plain $marco/qrels.train.tsv
make queries.train.tsv 502939 judged
make queries.dev.tsv 6980 member $marco/collectionandqueries.tar.gz queries.dev.small.tsv
make qrels.dev.tsv 7437 member $marco/collectionandqueries.tar.gz qrels.dev.small.tsv
make top1000.dev 6668967 member $marco/top1000.dev.tar.gz top1000.dev
make queries.dl19.tsv 200 unpacked $marco/msmarco-test2019-queries.tsv.gz
make qrels.dl19.txt 9260 plain $trec/2019qrels-pass.txt
make top1000.dl19.tsv 189877 unpacked $marco/msmarco-passagetest2019-top1000.tsv.gz
make queries.dl20.tsv 200 unpacked $marco/msmarco-test2020-queries.tsv.gz
make qrels.dl20.txt 11386 plain $trec/2020qrels-pass.txt
make top1000.dl20.tsv 190699 unpacked $marco/msmarco-passagetest2020-top1000.tsv.gz
if [ -n "$titles$check" ]; then make corpus.tsv 8841823 joined; fi
if [ -n "$negatives$check" ]; then make train.negatives.tsv 400782 negatives; fi
if [ -n "$triples$check" ]; then
    make triples.train.small.tsv 39780811 member $marco/triples.train.small.tar.gz triples.train.small.tsv
fi
if [ -n "$id_triples$check" ]; then make triples.train.ids.tsv 397768673 ids; fi
if [ -n "$documents$check" ]; then
    make documents/corpus.tsv 3213835 unpacked $marco/msmarco-docs.tsv.gz
    make documents/queries.train.tsv 367013 unpacked $marco/msmarco-doctrain-queries.tsv.gz
    make documents/qrels.train.tsv 367013 unpacked $marco/msmarco-doctrain-qrels.tsv.gz
    make documents/queries.dev.tsv 5193 unpacked $marco/msmarco-docdev-queries.tsv.gz
    make documents/qrels.dev.tsv 5193 unpacked $marco/msmarco-docdev-qrels.tsv.gz
    make documents/top100.dev.trec 519300 unpacked $marco/msmarco-docdev-top100.gz
    make documents/queries.dl19.tsv 200 unpacked $marco/msmarco-test2019-queries.tsv.gz
    make documents/qrels.dl19.txt 16258 plain $trec/2019qrels-docs.txt
    make documents/top100.dl19.trec 20000 unpacked $marco/msmarco-doctest2019-top100.gz
    make documents/queries.dl20.tsv 200 unpacked $marco/msmarco-test2020-queries.tsv.gz
    make documents/qrels.dl20.txt 9098 plain $trec/2020qrels-docs.txt
    make documents/top100.dl20.trec 20000 unpacked $marco/msmarco-doctest2020-top100.gz
fi
