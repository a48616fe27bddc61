#!/usr/bin/env bash
# Runs a job on Google Kubernetes Engine as a JobSet: one pod per host, all of which restart when one fails.
#
#   launch/gke.sh run    NAME --image=IMAGE --type=v5litepod-16 [--slices=2] [--env HF_TOKEN] -- policy --gin_file=...
#   launch/gke.sh logs   NAME          follow the first worker
#   launch/gke.sh delete NAME
#
# --xpk --cluster=CLUSTER --zone=ZONE submits the workload to XPK, which supports queues and quotas; without it kubectl
# applies a JobSet (whose controller, 0.10 or newer, must be installed) to the cluster of the current context.
# launch/Dockerfile makes the image. --dry_run prints the commands and objects only.
#
# --env sets a variable of the job, by default to its value in this shell, and --env_file=FILE those of a file
# (NAME[=VALUE] on each line): HF_TOKEN, TASKMASTER_DIR, TLDR_SOURCE. They are stored in the Kubernetes secret NAME-env.
# --secret=SECRET adds all keys of an existing secret. XPK does not support secrets: it writes variables into the
# workload, where everybody with access to it can read them.
#
# --restarts=10 limits how often the job restarts after a fault. Exit code 2, an error that you can correct, ends it at
# once. Preemptions (75, or reported by the cluster) and their effects on other processes (76) do not count, except
# with XPK. Flags for kubectl or xpk come after --, before a second one: -- --namespace=mine -- policy ...
set -euo pipefail

die() { printf 'launch/gke.sh: %s\n' "${1//[[:cntrl:]]/?}" >&2; exit 2; } # one line, whatever it quotes
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

[[ $# -ge 2 ]] || usage
command=$1
name=$2
shift 2
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
image='' type='' slices=1 cluster='' zone='' xpk='' dry_run='' restarts=10 secrets=() tool_flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --env=*) add_env "${1#*=}" ;;
    --env) [[ $# -ge 2 ]] || die '--env: give NAME or NAME=VALUE'; shift; add_env "$1" ;;
    --env_file=*) add_env_file "${1#*=}" ;;
    --secret=*) secrets+=("${1#*=}") ;;
    --xpk) xpk=yes ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    -*) die "unknown flag '${1%%=*}'; flags for kubectl or xpk come after --" ;;
    *) die 'an argument that is not a flag; the perl_jax command comes after --' ;;
  esac
  shift
done

split_words 'kubectl or xpk' "$@"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#name} -le 40 ]] || die "'$name': a name has at most 40 of a-z, 0-9 and -"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: give a number"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts=$restarts: give a number"
[[ $image =~ ^[A-Za-z0-9._/:@-]*$ ]] || die '--image=...: the name of an image has only letters, digits and . _ / : @ -'
for secret_name in "${secrets[@]}"; do
  [[ $secret_name =~ ^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$ ]] || die "--secret=...: the name of a secret has only a-z, 0-9, - and ."
done
[[ -n $xpk || -z $cluster$zone ]] || die '--cluster and --zone require --xpk; kubectl uses the cluster of its context'
[[ -z $xpk || -n $cluster && -n $zone ]] || die '--xpk needs --cluster=... and --zone=...'
[[ $((${#env_names[@]} + ${#secrets[@]})) -eq 0 || $command == run ]] || die "$command: variables are for run"

run_command() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    need "$1"
    "$@"
  fi
}

need() { type -P "$1" > /dev/null || die "there is no $1 on PATH; install it"; }

preempted=75,76 # exit codes after which the job restarts (perl_jax/cli/main.py)
grace=300 # seconds that a preempted process has to save

# Prints for a type: GKE's accelerator name, the topology of the slice, the number of hosts, the chips per host.
shape() {
  case $1 in
    v5litepod-4) echo 'tpu-v5-lite-podslice 2x2 1 4' ;;
    v5litepod-8) echo 'tpu-v5-lite-podslice 2x4 1 8' ;;
    v5litepod-16) echo 'tpu-v5-lite-podslice 4x4 4 4' ;;
    v5litepod-32) echo 'tpu-v5-lite-podslice 4x8 8 4' ;;
    v5litepod-64) echo 'tpu-v5-lite-podslice 8x8 16 4' ;;
    v5litepod-128) echo 'tpu-v5-lite-podslice 8x16 32 4' ;;
    v5litepod-256) echo 'tpu-v5-lite-podslice 16x16 64 4' ;;
    v6e-4) echo 'tpu-v6e-slice 2x2 1 4' ;;
    v6e-8) echo 'tpu-v6e-slice 2x4 1 8' ;;
    v6e-16) echo 'tpu-v6e-slice 4x4 4 4' ;;
    v6e-32) echo 'tpu-v6e-slice 4x8 8 4' ;;
    v6e-64) echo 'tpu-v6e-slice 8x8 16 4' ;;
    v6e-128) echo 'tpu-v6e-slice 8x16 32 4' ;;
    v6e-256) echo 'tpu-v6e-slice 16x16 64 4' ;;
    v4-8) echo 'tpu-v4-podslice 2x2x1 1 4' ;;
    v4-16) echo 'tpu-v4-podslice 2x2x2 2 4' ;;
    v4-32) echo 'tpu-v4-podslice 2x2x4 4 4' ;;
    v4-64) echo 'tpu-v4-podslice 2x4x4 8 4' ;;
    v4-128) echo 'tpu-v4-podslice 4x4x4 16 4' ;;
    v4-256) echo 'tpu-v4-podslice 4x4x8 32 4' ;;
    v4-512) echo 'tpu-v4-podslice 4x8x8 64 4' ;;
    v5p-8) echo 'tpu-v5p-slice 2x2x1 1 4' ;;
    v5p-16) echo 'tpu-v5p-slice 2x2x2 2 4' ;;
    v5p-32) echo 'tpu-v5p-slice 2x2x4 4 4' ;;
    v5p-64) echo 'tpu-v5p-slice 2x4x4 8 4' ;;
    v5p-128) echo 'tpu-v5p-slice 4x4x4 16 4' ;;
    v5p-256) echo 'tpu-v5p-slice 4x4x8 32 4' ;;
    v5p-512) echo 'tpu-v5p-slice 4x8x8 64 4' ;;
    tpu7x-8) echo 'tpu7x 2x2x1 1 4' ;;
    tpu7x-16) echo 'tpu7x 2x2x2 2 4' ;;
    tpu7x-32) echo 'tpu7x 2x2x4 4 4' ;;
    tpu7x-64) echo 'tpu7x 2x4x4 8 4' ;;
    tpu7x-128) echo 'tpu7x 4x4x4 16 4' ;;
    tpu7x-256) echo 'tpu7x 4x4x8 32 4' ;;
    tpu7x-512) echo 'tpu7x 4x8x8 64 4' ;;
    *) die "--type=$1: give v4-{8..512}, v5litepod-{4..256}, v5p-{8..512}, v6e-{4..256} or tpu7x-{8..512}" ;;
  esac
}

# Prints the arguments as a YAML list in one line. Kubernetes expands $(NAME) and reads $$ as $.
yaml_list() {
  local word out=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die 'an argument has a line break or another control character in it'
    word=${word//'$'/'$$'}
    out+=", '${word//\'/\'\'}'"
  done
  echo "[${out#, }]"
}

# In YAML a name such as null or on is none, unless it is quoted.

# Prints the job's variables as a secret; a dry run shows only their names.
secret() {
  local i value
  cat << YAML
apiVersion: v1
kind: Secret
metadata:
  name: '$name-env'
data:
YAML
  for i in "${!env_names[@]}"; do
    value="'not shown'"
    [[ -n $dry_run ]] || value="'$(printf %s "${env_values[i]}" | base64 | tr -d '\n')'"
    echo "  '${env_names[i]}': $value" # quoted, since an empty value would be null
  done
  echo ---
}

# Prints the sources of a container's variables.
env_from() {
  local secret_name secret_names=("${secrets[@]}")
  [[ ${#env_names[@]} -eq 0 ]] || secret_names+=("$name-env")
  [[ ${#secret_names[@]} -gt 0 ]] || return 0
  printf '\n              envFrom:'
  for secret_name in "${secret_names[@]}"; do
    printf '\n              - secretRef: {name: '\''%s'\''}' "$secret_name"
  done
}

# When a pod fails, the first matching rule of podFailurePolicy fails its job with a reason, which the rules of
# failurePolicy then match. A failure that matches no rule is a fault of the program and counts as a restart.
jobset() {
  local row accelerator topology hosts chips variables args
  # A failure within $(..) must be handled by ||, since set -e does not apply there.
  row=$(shape "$type") || exit 2
  args=$(yaml_list "$@" --distributed) || exit 2
  read -r accelerator topology hosts chips <<< "$row"
  [[ $slices -eq 1 || $hosts -gt 1 ]] || die "--slices=$slices: $type is one host; GKE requires several hosts per slice"
  [[ ${#env_names[@]} -eq 0 ]] || secret
  variables=$(env_from)
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: '$name'
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['failed with exit code 2 ']
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: perl-jax, operator: In, values: [2]}
          - action: FailJob
            onExitCodes: {containerName: perl-jax, operator: In, values: [$preempted]}
          - action: FailJob
            onPodConditions:
            - {type: DisruptionTarget, status: 'True'}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: perl-jax
              image: '$image'
              command: [perl_jax]
              args: $args$variables
              ports:
              - containerPort: 8471
              - containerPort: 8476
              resources:
                requests: {google.com/tpu: $chips}
                limits: {google.com/tpu: $chips}
YAML
}

xpk_create() {
  local i flags=()
  [[ ${#secrets[@]} -eq 0 ]] || die '--secret: XPK does not support secrets; give the variables with --env'
  if [[ ${#env_names[@]} -gt 0 ]]; then
    for i in "${!env_names[@]}"; do # XPK writes a value into YAML in double quotes, without escaping
      [[ ${env_values[i]} != *[\"\\]* ]] || die "--env ${env_names[i]}: XPK cannot pass values that contain \" or \\"
    done
    if [[ -n $dry_run ]]; then
      echo "# perl_jax.env: ${env_names[*]}"
      flags=(--env-file=perl_jax.env)
    else
      file=$(mktemp) # readable by its owner alone
      trap 'rm -f "$file"' EXIT
      env_lines > "$file"
      flags=(--env-file="$file")
    fi
  fi
  # By default XPK starts two containers per Ironwood host; perl_jax uses all devices of a host in one process.
  [[ $type != tpu7x-* ]] || flags+=(--no-use-parallel-containers)
  # exec: XPK sends SIGTERM to the shell of the command.
  run_command xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" \
    --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" --restart-on-exit-codes=$preempted \
    --termination-grace-period-seconds=$grace "${flags[@]}" "${tool_flags[@]}" \
    --command="exec perl_jax $(printf '%q ' "$@")--distributed"
}

case $command in
  run)
    [[ ${job_command[0]:-} != perl_jax ]] || job_command=("${job_command[@]:1}")
    [[ ${#job_command[@]} -gt 0 ]] || die 'run: the perl_jax command comes after --, such as -- policy --gin_file=...'
    [[ -n $image ]] || die '--image=... is missing (launch/Dockerfile makes one)'
    [[ -n $type ]] || die '--type=... is missing, such as --type=v5litepod-16'
    if [[ -n $xpk ]]; then
      xpk_create "${job_command[@]}"
    elif [[ -n $dry_run ]]; then
      jobset "${job_command[@]}"
      printf '# applied by: '
      run_command kubectl apply -f - "${tool_flags[@]}"
    else
      spec=$(jobset "${job_command[@]}") || exit 2
      need kubectl
      kubectl apply -f - "${tool_flags[@]}" <<< "$spec"
    fi
    ;;
  logs)
    first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    run_command kubectl logs --follow --selector="$first" "${tool_flags[@]}"
    ;;
  delete)
    if [[ -n $xpk ]]; then
      run_command xpk workload delete --workload="$name" --cluster="$cluster" --zone="$zone" "${tool_flags[@]}"
    else
      run_command kubectl delete jobset "$name" "${tool_flags[@]}"
      run_command kubectl delete secret "$name-env" --ignore-not-found "${tool_flags[@]}"
    fi
    ;;
  *) die "no command is called '$command'; there are run, logs, delete" ;;
esac
