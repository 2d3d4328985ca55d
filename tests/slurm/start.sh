#!/usr/bin/env bash
# Starts a real Slurm of one node on this machine, without systemd:
#
#     tests/slurm/start.sh DIR            # configuration, state and logs go to DIR; "DIR accounting": with sacct
#     export SLURM_CONF=DIR/slurm.conf    # for sbatch, squeue, the tests and run.py
#     tests/slurm/stop.sh DIR
#
# Needs slurmctld, slurmd, slurm-client and munge (Debian and Ubuntu: apt-get install those four), and root.
# The node claims 8 CPUs whatever the machine has, so that jobs of several ranks fit on a laptop. Accounting also needs
# slurmdbd and mariadb-server; with it submitit notices a job that was killed.
set -euo pipefail

dir=$(mkdir -p "$1" && cd "$1" && pwd)
accounting=${2:-}
needed="munged slurmctld slurmd sinfo"
[ -n "$accounting" ] && needed="$needed slurmdbd mariadbd mariadb-install-db sacctmgr"
for program in $needed; do
    if ! command -v "$program" >/dev/null; then
        echo "$program is not installed; on Debian or Ubuntu: apt-get install slurmctld slurmd slurm-client munge" \
            "(accounting: slurmdbd mariadb-server)" >&2
        exit 1
    fi
done

user=$(id -un)
host=$(hostname -s)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
mkdir -p "$dir"/{munge,state,spool,log}
chmod 700 "$dir/munge"

if [ ! -f "$dir/munge/key" ]; then
    dd if=/dev/urandom of="$dir/munge/key" bs=1 count=1024 status=none
    chmod 600 "$dir/munge/key"
fi
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"

accounting_settings=""
if [ -n "$accounting" ]; then
    export MYSQL_UNIX_PORT=$dir/db/socket # where slurmdbd's client library looks
    if [ ! -d "$dir/db" ]; then
        mariadb-install-db --user="$user" --datadir="$dir/db" --skip-test-db --auth-root-authentication-method=socket \
            >"$dir/log/mariadb-install.log" 2>&1
    fi
    mariadbd --no-defaults --user="$user" --datadir="$dir/db" --socket="$dir/db/socket" --skip-networking \
        --pid-file="$dir/mariadb.pid" >"$dir/log/mariadb.log" 2>&1 &
    for _ in $(seq 100); do [ -S "$dir/db/socket" ] && break || sleep 0.1; done
    dbd_port=$(free_port)
    cat >"$dir/slurmdbd.conf" <<EOF
DbdHost=localhost
DbdPort=$dbd_port
SlurmUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=$user
StorageLoc=slurm_acct
EOF
    chmod 600 "$dir/slurmdbd.conf"
    SLURM_CONF=$dir/slurm.conf slurmdbd
    for _ in $(seq 100); do [ -f "$dir/slurmdbd.pid" ] && break || sleep 0.1; done
    accounting_settings="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$dbd_port
AccountingStoragePass=$dir/munge/socket"
fi

cat >"$dir/slurm.conf" <<EOF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=$(free_port)
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool/%n
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=node0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 State=UNKNOWN
$accounting_settings
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
EOF
export SLURM_CONF=$dir/slurm.conf
if [ -n "$accounting" ]; then
    sacctmgr --immediate add cluster one >"$dir/log/sacctmgr.log" 2>&1 || true # it may be there already
fi
slurmctld
slurmd -N node0
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
        echo "Slurm runs; export SLURM_CONF=$SLURM_CONF"
        exit 0
    fi
    sleep 0.1
done
echo "Slurm did not come up within 10 s; its logs are in $dir/log" >&2
"$(dirname "$0")/stop.sh" "$dir"
exit 1
