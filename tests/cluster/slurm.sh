#!/usr/bin/env bash
# One-node Slurm for tests: `slurm.sh start` installs the packages if need be and starts the daemons, `slurm.sh stop`
# ends them and removes what start wrote. Root on Debian or Ubuntu. All state is in $STATE; only the configuration
# has to be in /etc/slurm, where a Slurm that is already there is left alone.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
STATE=/run/atp-slurm
CONF=/etc/slurm/slurm.conf
GRES=/etc/slurm/gres.conf
MARK="# Written by tests/cluster/slurm.sh"

fail() { echo "slurm.sh: $*" >&2; exit 1; }
ours() { [ -f $CONF ] && [ "$(head -n 1 $CONF)" = "$MARK" ]; }

start() {
    [ "$(id -u)" = 0 ] || fail "must be run as root"
    if [ -e $CONF ] && ! ours; then fail "$CONF belongs to another Slurm, which is left as it is"; fi
    if [ -e $GRES ] && ! ours; then fail "$GRES belongs to another Slurm, which is left as it is"; fi
    stop
    if ! command -v slurmctld munged srun mungekey > /dev/null; then
        command -v apt-get > /dev/null || fail "slurm-wlm and munge are missing, and there is no apt-get"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    fi
    install -d -m 755 $STATE $STATE/ctld $STATE/d /etc/slurm
    install -d -m 755 -o munge -g munge $STATE/munge
    runuser -u munge -- mungekey --create --keyfile $STATE/munge/key
    runuser -u munge -- munged --key-file $STATE/munge/key --socket $STATE/munge/socket \
        --pid-file $STATE/munge/munged.pid --log-file $STATE/munge/munged.log --seed-file $STATE/munge/seed
    # Half of the memory: the machine may have other work.
    memory=$(awk '/MemTotal/ {print int($2 / 2048)}' /proc/meminfo)
    sed -e "s|@HOST@|$(hostname -s)|" -e "s|@STATE@|$STATE|" -e "s|@CPUS@|$(nproc)|" -e "s|@MEMORY@|$memory|" \
        "$here/slurm.conf" > $CONF
    echo "Name=gpu File=/dev/null" > $GRES
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if timeout 20 sinfo --noheader --format %t 2> /dev/null | grep -q '^idle'; then return; fi
        if ! [ -e "/proc/$(cat $STATE/slurmctld.pid)" ]; then break; fi
        sleep 1
    done
    tail -n 20 $STATE/*.log >&2
    fail "the node did not become idle"
}

stop() {
    # Jobs first: slurmd's end would leave them running.
    if [ -f $STATE/slurmctld.pid ] && ours; then
        timeout 20 scancel --partition debug 2> /dev/null || true
        for _ in $(seq 20); do
            [ -n "$(timeout 20 squeue --noheader 2> /dev/null)" ] || break
            sleep 1
        done
    fi
    for pid in slurmd slurmctld munge/munged; do
        end "$STATE/$pid.pid" "$(basename $pid)"
    done
    rm -rf $STATE
    if ours; then rm -f $GRES $CONF; fi
}

end() { # PIDFILE NAME: end the process, if it still is that program
    [ -f "$1" ] || return 0
    local pid
    pid=$(cat "$1")
    [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = "$2" ] || return 0
    kill "$pid"
    for _ in $(seq 100); do
        [ -d "/proc/$pid" ] || return 0
        sleep 0.2
    done
    # slurmd without its controller hardly listens.
    kill -KILL "$pid"
}

case "${1:-}" in
    start | stop) "$1" ;;
    *) fail "expected start or stop" ;;
esac
