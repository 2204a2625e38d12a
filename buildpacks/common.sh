# What every buildpack here needs. Source it; it defines functions and sets strict mode.
set -euo pipefail

headline() { echo "-----> $*"; }

# The app's configuration, one file per variable in the directory given. Variables that would break the build's own
# tools stay out.
export_env_dir() {
  local dir=${1:-} file name
  [[ -n $dir && -d $dir ]] || return 0
  for file in "$dir"/*; do
    [[ -f $file ]] || continue
    name=${file##*/}
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || continue
    case $name in
      PATH | HOME | TMPDIR | USER | SHELL | GIT_* | LD_* | LIBRARY_PATH | CPATH | IFS | BASH_ENV | PYTHONHOME | PYTHONPATH | NODE_OPTIONS) ;;
      *) export "$name=$(<"$file")" ;;
    esac
  done
}

# A name for "the same dependencies": the contents of the files given (missing ones count as empty) and some words.
stamp_of() {
  local words=$1 file
  shift
  { echo "$words ${STACK:-}"; for file in "$@"; do echo "== $file"; [[ -f $file ]] && cat "$file"; done; true; } | sha256sum | cut -d' ' -f1
}
