#!/bin/sh
# What scripts that take words from a person have in common; they source this, and define `fail`.

# whole NAME VALUE LEAST: refuses what is no whole number from LEAST on.
whole() {
    case $2 in
    '' | *[!0-9]* | 0?* | ??????*) fail "$1 $2: must be a whole number from $3 to 99999" ;;
    esac
    if [ "$2" -lt "$3" ]; then fail "$1 $2: must be a whole number from $3 to 99999"; fi
}

# Words on one line, as a shell reads them back.
quoted() {
    for word in "$@"; do
        case $word in
        '' | *[!A-Za-z0-9_./:=+,@%-]*)
            printf "'%s' " "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"
            ;;
        *) printf '%s ' "$word" ;;
        esac
    done | sed 's/ $//'
}
