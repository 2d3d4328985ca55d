#!/usr/bin/env bash
# Ends what start.sh started in DIR. Running jobs are cancelled and waited for: otherwise their slurmstepd would stay.
set -uo pipefail
dir=$(cd "$1" && pwd)
export SLURM_CONF=$dir/slurm.conf
scancel --user "$(id -un)" 2>/dev/null
for _ in $(seq 300); do
    [ -z "$(squeue --noheader 2>/dev/null)" ] && break
    sleep 0.1
done
for pid_file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/slurmdbd.pid" "$dir/mariadb.pid" "$dir/munge/pid"; do
    [ -f "$pid_file" ] && kill "$(cat "$pid_file")" 2>/dev/null
done
for _ in $(seq 100); do
    compgen -G "$dir/*.pid" >/dev/null || break
    sleep 0.1
done
exit 0
