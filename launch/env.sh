# For the scripts beside this one, which source it: the variables of --env NAME[=VALUE] and --env_file=FILE, and what
# stands behind --.
#
# The value of a NAME alone is that of the exported variable. A file has a NAME or NAME=VALUE a line; # begins a comment.
# No value is ever printed, nor made a word of a command, where another user of the machine could read it; nor is what
# stands in a value's place, as a name that is none may be.

env_names=()
env_values=()

# NAME or NAME=VALUE; of two for one name the later counts. The second argument is what to call it in errors.
add_env() {
  local name=${1%%=*} value i said=${2:---env}
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "$said: give NAME or NAME=VALUE, NAME of letters, digits and _"
  if [[ $1 == *=* ]]; then
    value=${1#*=}
  elif [[ $name != *[A-Z]* ]]; then # the scripts' own variables have such names
    die "$said: of a name in small letters give the value too, NAME=VALUE"
  elif [[ $(declare -p "$name" 2> /dev/null) =~ ^declare\ -[a-zA-Z]*x ]]; then
    value=${!name}
  else
    [[ ! $name =~ ^[A-Z][A-Z0-9_]*$ ]] || said+=" $name" # else it may be a value that lacks its name
    die "$said: there is no variable of that name here; export it, or give NAME=VALUE"
  fi
  [[ $value != *[$'\n\r']* ]] || die "$said $name: its value has a line break, which no file of variables can hold"
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
  [[ -r $1 && ! -d $1 ]] || die "--env_file=$1: no file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    ((number += 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] || add_env "$line" "$1, line $number"
  done < "$1"
}

# What was given, as the lines of such a file.
env_lines() {
  local i
  for i in "${!env_names[@]}"; do
    printf '%s=%s\n' "${env_names[i]}" "${env_values[i]}"
  done
}

# What is left of a call: perl_jax's `words`, with the flags of another tool, `more`, before a second -- (where `command`
# is not run, all of it is those). The first argument is what the tool is called.
split_words() {
  local tool=$1 word
  shift
  words=()
  for word in "$@"; do
    if [[ $command == run && $word == -- && ${#more[@]} -eq 0 ]]; then
      more=("${words[@]}")
      words=()
    else
      words+=("$word")
    fi
  done
  [[ $command == run ]] || more=("${words[@]}")
  for word in "${more[@]}"; do
    [[ $word == -* ]] || die "'$word' is no flag; flags for $tool, behind --, have their values behind ="
  done
}
