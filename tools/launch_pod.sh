#!/usr/bin/env bash
# Trains on a Google Cloud TPU slice: asks for it, installs, runs on all of its hosts,
# and begins again where it is taken away. A run goes on from its last checkpoint.
set -euo pipefail

usage() {
  cat <<'TEXT'
tools/launch_pod.sh VERB --name NAME --zone ZONE [options] [-- CONFIG [oreal's options]]

verbs
  up        create, install, run; all of it again after each preemption, until done
  create    ask for the slice and wait until it is there
  install   this checkout onto every host, and what it needs
  run       `oreal train CONFIG ... --run /mnt/oreal/runs/NAME` on every host
  status    what has become of the request
  delete    give the slice back (its price runs until then)

options
  --name NAME          of the request, of the slice and of the run
  --zone ZONE          e.g. us-east5-a
  --project PROJECT    default: gcloud's own
  --type TYPE          of the slice, default v5p-64
  --runtime VERSION    of its hosts, default v2-alpha-tpuv5
  --nfs SERVER:/SHARE  mounted at /mnt/oreal on every host: the run, the model, the data
  --spot               cheaper, and may be taken away
  --dry-run            print the commands, run none
  --help

example
  tools/launch_pod.sh up --name oreal7b --zone us-east5-a --nfs 10.0.0.2:/share --spot \
      -- configs/oreal_7b.py --set model=/mnt/oreal/OREAL-7B-SFT
TEXT
}

fail() {
  echo "launch_pod.sh: $1 (--help)" >&2
  exit 2
}

verb=""
name="" zone="" project="" type="v5p-64" runtime="v2-alpha-tpuv5" nfs=""
spot=false dry=false
pause="${PAUSE:-30}" # seconds between two looks at the request
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage && exit 0 ;;
    --name | --zone | --project | --type | --runtime | --nfs)
      [ $# -gt 1 ] || fail "$1: no value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --spot) spot=true ;;
    --dry-run) dry=true ;;
    --) shift && break ;;
    -*) fail "$1: no such option" ;;
    *)
      [ -z "$verb" ] || fail "$1: behind the verb $verb; a config goes behind --"
      verb="$1"
      ;;
  esac
  shift
done
[ -n "$verb" ] || fail "no verb"
[ -n "$name" ] || fail "--name is missing"
[ -n "$zone" ] || fail "--zone is missing"
case "$verb" in
  up | install) [ -n "$nfs" ] || fail "--nfs is missing: all hosts share the run" ;;
esac
case "$verb" in
  up | run) [ $# -gt 0 ] || fail "no config behind --" ;;
esac

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")

# Prints a command; runs it unless that is all that is wanted.
step() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $dry || "$@"
}

on_all_hosts() {
  # A host that is gone must not be waited for.
  step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --ssh-flag="-o ServerAliveInterval=15" --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
  local more=()
  ! $spot || more=(--spot)
  step gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
    ${more[@]+"${more[@]}"} || return
  $dry && return
  local found=""
  until [ "$found" = ACTIVE ]; do
    found=$(state)
    case "$found" in
      FAILED | SUSPEND* | NONE) echo "the request is $found" >&2 && return 1 ;;
    esac
    echo "$(date +%T) $found"
    sleep "$pause"
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/$name.tar.gz"
  step git archive --format=tar.gz --output="$archive" HEAD &&
    step gcloud compute tpus tpu-vm scp "$archive" "$name:oreal.tar.gz" \
      "${place[@]}" --worker=all &&
    on_all_hosts "set -e
sudo apt-get -qq update
sudo apt-get -qq install -y nfs-common python3.11-venv
sudo mkdir -p /mnt/oreal
mountpoint -q /mnt/oreal || sudo mount -t nfs $nfs /mnt/oreal
mkdir -p oreal-jax
tar -xzf oreal.tar.gz -C oreal-jax
cd oreal-jax
python3.11 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'"
}

run() {
  local words
  words=$(printf ' %q' "$@")
  # Each host finds its place among the others from the slice's metadata.
  on_all_hosts "cd oreal-jax && OREAL_PROCESSES=auto .venv/bin/oreal train$words --run /mnt/oreal/runs/$name"
}

delete() {
  step gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Whether the slice is going or gone; Google says so some time after it has gone.
taken_away() {
  local try
  for try in 1 2 3 4 5; do
    [ "$(state)" = ACTIVE ] || return 0
    sleep "$pause"
  done
  return 1
}

up() {
  while true; do
    if create && install && run "$@"; then
      delete
      return
    fi
    if ! taken_away; then
      echo "the run ended and the slice is there: not a preemption; see above." >&2
      echo "Go on with: $0 run ...; give the slice back with: $0 delete ..." >&2
      return 1
    fi
    echo "the slice was taken away; asking for another" >&2
    delete || true
    sleep "$pause"
  done
}

case "$verb" in
  up | run) "$verb" "$@" ;;
  create | install | delete) "$verb" ;;
  status) step gcloud compute tpus queued-resources describe "$name" "${place[@]}" ;;
  *) fail "$verb: no such verb" ;;
esac
