#!/usr/bin/env bash
# Trains on a TPU slice of any number of machines, which gcloud gets as a queued resource.
#
#   launch/tpu_vm.sh create           asks for the slice; it may wait in the queue for hours
#   launch/tpu_vm.sh status           where that stands and, on each machine, the last line of the log
#   launch/tpu_vm.sh setup            waits for the slice; copies the code to each machine and installs it
#   launch/tpu_vm.sh run [FLAG...]    starts training, which goes on when this shell is closed
#   launch/tpu_vm.sh logs             follows the log of worker 0; WORKER=3 follows another's
#   launch/tpu_vm.sh stop             asks the training to save and to leave
#   launch/tpu_vm.sh resume [FLAG...] after a preemption: delete, create, setup, run
#   launch/tpu_vm.sh delete           gives the slice back; WORKDIR stays
#
# FLAGs go to cjepa_jax.main: --config.optim.epochs=100. With --dry-run the commands are printed and none is run.
# The same run in the same WORKDIR goes on from the newest checkpoint.
set -euo pipefail

dry=
for argument; do # takes --dry-run out, wherever it stands
  shift
  if [[ $argument == --dry-run ]]; then dry=1; else set -- "$@" "$argument"; fi
done
subcommand=${1:-help}
[[ $# == 0 ]] || shift
if [[ $subcommand == *help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0"
  exit
fi

# Each is taken from the environment, where it is set there.
: "${PROJECT:?the Google Cloud project, e.g. PROJECT=my-project}"
: "${ZONE:?where the project has TPU quota, e.g. ZONE=us-central1-a}"
: "${WORKDIR:?results and checkpoints, e.g. WORKDIR=gs://my-bucket/vitb16}"
NAME=${NAME:-cjepa}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-64}
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite} # of that accelerator: v2-alpha-tpuv6e for v6e-64
SPOT=${SPOT-1} # SPOT= asks for machines that are not preempted
CONFIG=${CONFIG:-configs/vitb16.py}
DATA_DIR=${DATA_DIR:-} # gs://my-bucket/tensorflow_datasets; empty: what CONFIG says
REPO=${REPO:-$(cd "$(dirname "$0")/.." && pwd)} # this checkout, as last committed; or a URL to clone
WORKER=${WORKER:-0}

# The machines share no disk, and a preempted one loses its own.
[[ $WORKDIR == gs://* ]] || { echo "error: WORKDIR=$WORKDIR is not on gs://" >&2; exit 2; }

do_() {
  local word quote="'\\''"
  [[ $dry ]] || { "$@"; return; }
  for word; do # quoted as a shell needs it, and no more
    [[ $word =~ ^[-A-Za-z0-9_./:=@+,]+$ ]] || word="'${word//\'/$quote}'"
    printf '%s ' "$word"
  done
  echo
}
tpu() { do_ gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on_all() { tpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }

create() {
  tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot}
}

state() { tpu queued-resources describe "$NAME" --format='value(state.state)'; }

setup() {
  local now archive=${TMPDIR:-/tmp}/cjepa_jax.tar
  until [[ $dry ]] || { now=$(state) && [[ $now == ACTIVE ]]; }; do
    case ${now:=unknown} in
      FAILED | SUSPEND* | DELETING | unknown) echo "error: $NAME is $now" >&2; exit 1 ;;
    esac
    echo "$(date +%T) $NAME: $now"
    sleep 60
  done
  if [[ -d $REPO ]]; then
    do_ git -C "$REPO" archive --prefix=cjepa_jax/ --output="$archive" HEAD
    tpu tpu-vm scp "$archive" "$NAME:cjepa_jax.tar" --worker=all
    on_all "tar -xf cjepa_jax.tar"
  else
    on_all "git -C cjepa_jax pull --ff-only || git clone --depth=1 $REPO cjepa_jax"
  fi
  # uv brings the Python: the images' own is too old. The last two are how Python reads and writes gs://.
  on_all "cd cjepa_jax && python3 -m pip install --quiet --user uv && export PATH=\$HOME/.local/bin:\$PATH && \
uv venv --quiet --allow-existing --python=3.11 .venv && \
uv pip install --quiet --python=.venv -r requirements.txt 'jax[tpu]==0.10.2' gcsfs==2026.10.1 google-cloud-storage==3.17.1"
}

run() {
  local flags
  flags=$(printf ' %q' --config="$CONFIG" --workdir="$WORKDIR" ${DATA_DIR:+--config.data.data_dir="$DATA_DIR"} "$@")
  # The process holds the lock as long as it lives: two runs never share the chips and the workdir.
  on_all "set -e; cd cjepa_jax; flock -n ../cjepa.lock true || { echo 'a run is going on'; exit 1; }; \
nohup flock -n ../cjepa.lock .venv/bin/python -m cjepa_jax.main$flags >>../cjepa.log 2>&1 </dev/null &"
}

resume() {
  if [[ ! $dry && $(state) == ACTIVE ]]; then
    echo "error: $NAME is ACTIVE, so 'run' is enough; to rent it anew: stop, delete, create" >&2
    exit 1
  fi
  delete
  create
  setup
  run "$@"
}

status() {
  state
  if [[ $dry || $(state) == ACTIVE ]]; then
    on_all "pgrep -f '[c]jepa_jax.main' >/dev/null && echo running || echo not running; tail -n 1 cjepa.log"
  fi
}

logs() { tpu tpu-vm ssh "$NAME" --worker="$WORKER" --command="tail -n 100 -F cjepa.log"; }
stop() { on_all "pkill -TERM -f '[c]jepa_jax.main'"; }
delete() { tpu queued-resources delete "$NAME" --force --quiet; }

case $subcommand in
  create | status | setup | run | logs | stop | resume | delete) "$subcommand" "$@" ;;
  *) echo "error: unknown subcommand $subcommand; --help explains them" >&2; exit 2 ;;
esac
