# shellcheck shell=bash
# The scripts set what is read here: options, config, workdir.
# shellcheck disable=SC2154
# Shared by the scripts of this folder: options, --dry-run, and the command that trains.

dry_run=false

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints the comment at the head of the calling script.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}

# Runs a command, or with --dry-run prints it as it could be typed.
run() {
  if "$dry_run"; then
    local word words=()
    for word in "$@"; do words+=("$(printf '%q' "$word")"); done
    printf '%s\n' "${words[*]}"
  else
    "$@"
  fi
}

# Reads options --name=value into variables named in `options`; what follows -- goes to `train_arguments`.
# Usage: options=(name zone ...); parse_options "$@"
parse_options() {
  train_arguments=()
  while (($#)); do
    case $1 in
      --help | -h) usage; exit 0 ;;
      --dry-run) dry_run=true ;;
      --) shift; train_arguments=("$@"); return ;;
      --*=*)
        local key=${1%%=*} known=false option
        key=${key#--}
        for option in "${options[@]}"; do [[ $option == "$key" ]] && known=true; done
        "$known" || fail "unknown option --$key; options are: ${options[*]/#/--}"
        printf -v "$key" '%s' "${1#*=}"
        ;;
      *) fail "expected --option=value, got '$1'; arguments for the training follow --" ;;
    esac
    shift
  done
}

# Fails unless every named option has a value.
require() {
  local option
  for option in "$@"; do [[ -n ${!option} ]] || fail "--$option=... is missing; see --help"; done
}

# One shell word list that trains, quoted for another shell.
train_command() {
  local word words=(python -m unifusion_jax.train "--config=$config" "--workdir=$workdir")
  words+=(${train_arguments[@]+"${train_arguments[@]}"})  # older shells call an empty array unset
  for word in "${words[@]}"; do printf '%q ' "$word"; done
}
