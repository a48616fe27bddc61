#!/usr/bin/env bash
# A run on Google Kubernetes Engine, as a JobSet: one pod a host, all of them started again when one fails.
#
#   launch/gke.sh run    NAME --image=IMAGE --type=v5litepod-16 [--slices=2] -- policy --gin_file=... --gin.MODEL_DIR=...
#   launch/gke.sh logs   NAME          follow the first worker
#   launch/gke.sh delete NAME
#
# --xpk --cluster=CLUSTER --zone=ZONE hands the workload to XPK, which knows queues and quotas; without it kubectl applies
# a JobSet (its controller must be installed) to the cluster of the present context. --restarts=10 is how often the job
# may be started again (a preempted one exits with 75 and goes on). --dry_run prints what would be done. launch/Dockerfile
# makes the image.
set -euo pipefail

die() { echo "launch/gke.sh: $1" >&2; exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '$d' >&2; exit 2; }

[[ $# -ge 2 ]] || usage
command=$1
name=$2
shift 2
image='' type='' slices=1 cluster='' zone='' xpk='' dry_run='' restarts=10
while [[ $# -gt 0 ]]; do
  case $1 in
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --xpk) xpk=yes ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) die "unknown argument '$1'" ;;
  esac
  shift
done

do_it() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Of a type: GKE's name of the accelerator, the slice's shape, hosts, chips of a host.
shape() {
  case $1 in
    v5litepod-8) echo 'tpu-v5-lite-podslice 2x4 1 8' ;;
    v5litepod-16) echo 'tpu-v5-lite-podslice 4x4 4 4' ;;
    v5litepod-32) echo 'tpu-v5-lite-podslice 4x8 8 4' ;;
    v5litepod-64) echo 'tpu-v5-lite-podslice 8x8 16 4' ;;
    v5litepod-128) echo 'tpu-v5-lite-podslice 8x16 32 4' ;;
    v5litepod-256) echo 'tpu-v5-lite-podslice 16x16 64 4' ;;
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
    v5p-8) echo 'tpu-v5p-slice 2x2x1 1 4' ;;
    v5p-16) echo 'tpu-v5p-slice 2x2x2 2 4' ;;
    v5p-32) echo 'tpu-v5p-slice 2x2x4 4 4' ;;
    v5p-64) echo 'tpu-v5p-slice 2x4x4 8 4' ;;
    v5p-128) echo 'tpu-v5p-slice 4x4x4 16 4' ;;
    *) die "--type=$1: give v4-{8..128}, v5litepod-{8..256}, v5p-{8..128} or v6e-{8..256}" ;;
  esac
}

# The words of the command as a YAML list in one line.
yaml_list() {
  local word out=''
  for word in "$@"; do
    out+=", '${word//\'/\'\'}'"
  done
  echo "[${out#, }]"
}

jobset() {
  local row accelerator topology hosts chips
  row=$(shape "$type") # on a line of its own, so that its failure ends the script
  read -r accelerator topology hosts chips <<< "$row"
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: perl-jax
              image: $image
              command: [perl_jax]
              args: $(yaml_list "$@" --distributed)
              ports:
              - containerPort: 8471
              - containerPort: 8476
              resources:
                requests: {google.com/tpu: $chips}
                limits: {google.com/tpu: $chips}
YAML
}

case $command in
  run)
    [[ $# -gt 0 ]] || die 'run: what perl_jax is to do stands behind --, such as -- policy --gin_file=...'
    [[ $1 == perl_jax ]] && shift
    [[ -n $image ]] || die '--image=... is missing (launch/Dockerfile makes one)'
    [[ -n $type ]] || die '--type=... is missing, such as --type=v5litepod-16'
    if [[ -n $xpk ]]; then
      [[ -n $cluster && -n $zone ]] || die '--xpk needs --cluster=... and --zone=...'
      do_it xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" \
        --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" \
        --command="perl_jax $(printf '%q ' "$@")--distributed"
    elif [[ -n $dry_run ]]; then
      jobset "$@"
      echo '# to be applied by: kubectl apply -f -'
    else
      spec=$(jobset "$@")
      kubectl apply -f - <<< "$spec"
    fi
    ;;
  logs)
    do_it kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete)
    if [[ -n $xpk ]]; then
      do_it xpk workload delete --workload="$name" --cluster="$cluster" --zone="$zone"
    else
      do_it kubectl delete jobset "$name"
    fi
    ;;
  *) die "no command is called '$command'; there are run, logs, delete" ;;
esac
