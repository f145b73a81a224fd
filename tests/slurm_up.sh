#!/usr/bin/env bash
# A Slurm of one node on this machine, from Debian's packages: munged, slurmctld and slurmd on ports of their own.
#   tests/slurm_up.sh up DIR      install what is missing, start, and wait until the node is idle
#   tests/slurm_up.sh down DIR    end the three processes that `up` started, and take its configuration away
# GPUS=2 tests/slurm_up.sh up DIR pretends that the node has two GPUs.
# Needs root, and exits with 3 and one line where Slurm cannot be installed. It keeps no accounts. A job that takes more
# memory than it asked for is killed within a second or two.
set -euo pipefail

COMMAND=${1:?up or down} DIR=$(realpath -m "${2:?a folder}")
HOST=$(hostname -s)
LINK=/etc/slurm/slurm.conf # commands that jobs start find the configuration here only
export SLURM_CONF=$DIR/slurm.conf

running() { [ -s "$DIR/run/$1.pid" ] && kill -0 "$(cat "$DIR/run/$1.pid")" 2>/dev/null; }
cannot() { echo "slurm_up: $*" >&2; exit 3; }

down() {
  for daemon in slurmd slurmctld munged; do
    if running $daemon; then
      pid=$(cat "$DIR/run/$daemon.pid")
      kill "$pid"
      for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
      kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$DIR/run/$daemon.pid"
  done
  if [ "$(readlink $LINK 2>/dev/null)" = "$SLURM_CONF" ]; then rm -f $LINK; fi
}

install() {
  for program in munged slurmctld slurmd sbatch srun; do
    command -v $program >/dev/null || missing=1
  done
  [ -z "${missing:-}" ] && return
  command -v apt-get >/dev/null || cannot "no apt-get here: install slurmctld, slurmd, slurm-client and munge by hand"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge; } >"$DIR/log/apt.log" 2>&1 \
    || cannot "the packages slurmctld, slurmd, slurm-client and munge could not be installed: see $DIR/log/apt.log"
}

configure() {
  local memory gpus=""
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  if [ "${GPUS:-0}" -gt 0 ]; then # any device file will do: nothing keeps jobs from a device
    local devices=(/dev/null /dev/zero /dev/full /dev/random)
    gpus="Gres=gpu:$GPUS"
    for number in $(seq 0 $((GPUS - 1))); do
      echo "NodeName=$HOST Name=gpu File=${devices[$number]}"
    done >"$DIR/gres.conf"
  fi
  cat >"$SLURM_CONF" <<CONF
ClusterName=espalier
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.pid
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
ReturnToService=2
MinJobAge=300
KillWait=5
SlurmdParameters=config_overrides
${gpus:+GresTypes=gpu}
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$memory $gpus State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
  [ "$(id -u)" = 0 ] || cannot "only root can start it"
  mkdir -p "$DIR"/{state,spool,log,run} && chmod 755 "$DIR"
  install
  if [ -e $LINK ] && [ "$(readlink $LINK)" != "$SLURM_CONF" ]; then
    cannot "$LINK is there already: this machine has a Slurm of its own"
  fi
  configure
  mkdir -p /etc/slurm && ln -sfn "$SLURM_CONF" $LINK
  [ -s "$DIR/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
  # --force: the folders are not munge's own.
  running munged || munged --force --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" \
    --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" \
    >"$DIR/log/munged.out" 2>&1
  running slurmctld || slurmctld -c -i >"$DIR/log/slurmctld.out" 2>&1
  running slurmd || slurmd -N "$HOST" >"$DIR/log/slurmd.out" 2>&1
  for _ in $(seq 60); do
    state=$(sinfo -h -o %T 2>/dev/null || true)
    case $state in idle | mixed | allocated) return ;; esac
    sleep 0.5
  done
  echo "slurm_up: the node is ${state:-unknown} after 30 s: see $DIR/log" >&2
  down
  exit 1
}

"$COMMAND"
