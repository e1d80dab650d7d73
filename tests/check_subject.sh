#!/bin/sh
# Refuse a commit whose subject is empty or longer than 72 characters: check_subject.sh FILE, or the commits of a range
# of git's: check_subject.sh main..HEAD
if [ -f "$1" ]; then
    subjects=$(grep -v '^#' "$1" | sed -n 1p)
else
    subjects=$(git log --no-merges --format=%s "$1") || exit 1
    [ -n "$subjects" ] || exit 0
fi
printf '%s\n' "$subjects" | LC_ALL=C.UTF-8 awk '
    length($0) == 0 || length($0) > 72 {
        printf "subject of %d characters, expected 1 to 72: %s\n", length($0), $0
        bad = 1
    }
    END { exit bad }'
