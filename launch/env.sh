# Sourced by the scripts beside it: parses --env NAME[=VALUE], --env_file=FILE, and the arguments after --.
#
# A NAME without a value takes that of the exported variable. A file has NAME or NAME=VALUE on each line; # starts a
# comment. Values are never printed or passed as arguments, where other users of the machine could read them. Invalid
# names are not printed either, since they may be misplaced values.

env_names=()
env_values=()

# Adds NAME or NAME=VALUE; a later one overrides an earlier one. The second argument is its origin, for errors.
add_env() {
  local name=${1%%=*} value i origin=${2:---env}
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "$origin: give NAME or NAME=VALUE, NAME of letters, digits and _"
  if [[ $1 == *=* ]]; then
    value=${1#*=}
  elif [[ $name != *[A-Z]* ]]; then # the variables of these scripts are lower case
    die "$origin: of a name in small letters give the value too, NAME=VALUE"
  elif [[ $(declare -p "$name" 2> /dev/null) =~ ^declare\ -[a-zA-Z]*x ]]; then
    value=${!name}
  else
    [[ ! $name =~ ^[A-Z][A-Z0-9_]*$ ]] || origin+=" $name" # other names may be misplaced values
    die "$origin: there is no variable of that name here; export it, or give NAME=VALUE"
  fi
  [[ $value != *[$'\n\r']* ]] || die "$origin $name: its value has a line break, which a file of variables cannot contain"
  for i in "${!env_names[@]}"; do
    if [[ ${env_names[i]} == "$name" ]]; then
      env_values[i]=$value
      return
    fi
  done
  env_names+=("$name")
  env_values+=("$value")
}

add_env_file() {
  local line number=0
  [[ -r $1 && ! -d $1 ]] || die "--env_file=$1: not a readable file"
  while IFS= read -r line || [[ -n $line ]]; do
    ((number += 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] || add_env "$line" "$1, line $number"
  done < "$1"
}

# Prints the variables as lines of such a file.
env_lines() {
  local i
  for i in "${!env_names[@]}"; do
    printf '%s=%s\n' "${env_names[i]}" "${env_values[i]}"
  done
}

# Splits the remaining arguments into perl_jax's `job_command` and, before a second --, the `tool_flags` of another tool,
# whose name is the first argument. Commands other than run have tool flags only.
split_words() {
  local tool=$1 word
  shift
  job_command=()
  for word in "$@"; do
    if [[ $command == run && $word == -- && ${#tool_flags[@]} -eq 0 ]]; then
      tool_flags=("${job_command[@]}")
      job_command=()
    else
      job_command+=("$word")
    fi
  done
  [[ $command == run ]] || tool_flags=("${job_command[@]}")
  for word in "${tool_flags[@]}"; do
    [[ $word == -* ]] || die "'$word' is not a flag; flags for $tool, after --, are written --FLAG=VALUE"
  done
}
