#!/bin/bash
# Tries the units of systemd/ under a real systemd, which is PID 1 of namespaces of its own: on a copy of this machine's
# root that is gone afterwards, without its network. Nothing of the machine itself is changed.
#
#   sudo packaging/try-unit.sh [VENV [DEB...]]
#
# VENV (.venv) has mcpctl's dependencies, for the Python of the system. DEB are packages of another systemd, which is
# taken instead: systemd, libsystemd0 and libsystemd-shared of 253 or later try Type=notify-reload too. Needs root, overlayfs, cgroup2, systemd, openssl,
# curl and PostgreSQL's server. Prints a line for each thing that it has seen, and exits 1 where one was not so.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)

say() { printf '%s\n' "$*"; }
die() {
    say "try-unit: $*" >&2
    exit 2
}

# -- the machine ------------------------------------------------------------------------------------------------------

make_machine() { # becomes PID 1
    local up=$work/up root=$work/root layers=/ python packages deb folder
    mount -t tmpfs -o mode=755 tmpfs "$work"
    mkdir -p "$up" "$work/w" "$root"
    for deb in "$@"; do
        dpkg -x "$deb" "$work/other"
        layers=$work/other:/
    done
    for folder in bin sbin lib; do # where /bin is a link to usr/bin
        [[ -L /$folder && -d $work/other/$folder ]] || continue
        cp -a "$work/other/$folder/." "$work/other/usr/$folder"
        rm -r "$work/other/$folder"
    done
    mount -t overlay -o "lowerdir=$layers,upperdir=$up,workdir=$work/w" overlay "$root"
    mount -t proc proc "$root/proc"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    mkdir "$root/dev/shm" "$root/dev/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    while read -r name major minor; do
        mknod -m 666 "$root/dev/$name" c "$major" "$minor"
    done <<<$'null 1 3\nzero 1 5\nfull 1 7\nrandom 1 8\nurandom 1 9\ntty 5 0'

    # of systemd's own units only the journal
    rm -rf "$root"/etc/systemd/system/* "$root"/{usr/,}lib/systemd/system/*.target.wants
    install -d -m 755 "$root/etc/systemd/system/sysinit.target.wants"
    ln -s /lib/systemd/system/systemd-journald.service "$root/etc/systemd/system/sysinit.target.wants"
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"

    # mcpctl as the package installs it: /opt/mcpctl, /usr/bin/mcpctl, the user, the folders
    python=$(python_version /usr/bin/python3)
    packages=$root/opt/mcpctl/lib/$python/site-packages
    mkdir -p "$root/opt/mcpctl"
    /usr/bin/python3 -m venv --without-pip "$root/opt/mcpctl"
    mount -t overlay -o "ro,lowerdir=$here/src:$venv/lib/$python/site-packages" overlay "$packages"
    printf '#!/opt/mcpctl/bin/python3\nfrom mcpctl.cli.main import run\nrun()\n' >"$root/opt/mcpctl/bin/mcpctl"
    chmod 755 "$root/opt/mcpctl/bin/mcpctl"
    ln -sf /opt/mcpctl/bin/mcpctl "$root/usr/bin/mcpctl"
    install -m 644 "$here/systemd/sysusers.d/mcpctl.conf" "$root/usr/lib/sysusers.d/mcpctl.conf"
    install -m 644 "$here/systemd/tmpfiles.d/mcpctl.conf" "$root/usr/lib/tmpfiles.d/mcpctl.conf"
    chroot "$root" systemd-sysusers mcpctl.conf >/dev/null 2>&1
    chroot "$root" useradd --create-home somebody
    install -m 644 "$here"/systemd/*.{service,socket,timer} "$root/etc/systemd/system"
    install -m 644 "$here"/systemd/mcpctl.service.d/*.example "$root/opt/mcpctl"
    install -m 755 "$here/packaging/try-unit.sh" "$root/opt/mcpctl"

    ip link set lo up
    cd "$root"
    pivot_root . mnt
    umount -l /mnt
    mount --make-rshared / # as PID 1 finds it elsewhere; credentials are handed over by it
    exec env -i container=try-unit PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /lib/systemd/systemd --unit=basic.target --log-target=journal --show-status=no >/dev/null 2>&1 </dev/null
}

python_version() { "$1" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")'; }

# -- what is tried, within it -----------------------------------------------------------------------------------------

failed=0

check() { # check 'what should be so' COMMAND...
    local what=$1
    shift
    if "$@" >/tmp/said 2>&1; then
        say "ok      $what"
    else
        say "NOT SO  $what: $*"
        tail -n 8 /tmp/said | sed 's/^/            /'
        failed=1
    fi
}

not() { ! "$@"; }
journal() { journalctl -u "${1:-mcpctl}" --no-pager -o cat -n 20 | sed 's/^/            /'; }
soon() { # soon SECONDS COMMAND...: it becomes true
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < until)) || return 1
        sleep 0.1
    done
}
property() { systemctl show -P "$1" "${2:-mcpctl.service}"; }
is() { [[ $(property "$1") == "$2" ]]; }
says() { [[ $(property StatusText) == *$1* ]]; }
main_pid() { property MainPID; }
workers() { pgrep -P "$(main_pid)"; }
within() { nsenter -t "$(main_pid)" -m -- "$@"; } # sees the files that the server sees
read_only() { [[ $(within touch "$1/there" 2>&1) == *'Read-only file system'* ]]; }
unreadable() { [[ $(within setpriv --reuid mcpctl --regid mcpctl --clear-groups cat "$1" 2>&1) == *'Permission denied'* ]]; }
of_process() { grep -Eq "^$1:[[:space:]]*$2$" "/proc/$(main_pid)/status"; }
drop_in() { # drop_in NAME: reads it from stdin
    mkdir -p /etc/systemd/system/mcpctl.service.d
    cat >"/etc/systemd/system/mcpctl.service.d/$1.conf"
    systemctl daemon-reload
}

ask() { # ask QUERY [PORT]: its answer
    curl -sS --max-time 20 --cacert /root/ca.pem "https://localhost:${2:-8443}/mcp" \
        -H "Authorization: Bearer $(cat /root/token)" -H 'Content-Type: application/json' -H 'Accept: application/json' \
        -d '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"query_database","arguments":{"query":"'"$1"'"}}}'
}
answers() {
    local said
    said=$(ask 'select 6 * 7 as answer' "${1:-8443}") || return
    [[ $said == *'"rows":[[42]]'* ]] || { echo "$said" && return 1; }
}
signs_in() {
    local said
    said=$(curl -sS --max-time 20 --cacert /root/ca.pem https://localhost:8443/api/v1/auth \
        -H 'Content-Type: application/json' -d '{"user":"alice","password":"a long one for this trial"}') || return
    [[ $said == *'"session_id":"mcs_'* ]] || { echo "$said" && return 1; }
}
certificate() { # issues another one
    openssl req -newkey rsa:2048 -nodes -keyout /root/key.pem -subj /CN=localhost -out /root/request.pem 2>/dev/null
    openssl x509 -req -in /root/request.pem -CA /root/ca.pem -CAkey /root/ca.key -CAcreateserial -days 90 \
        -extfile <(echo subjectAltName=DNS:localhost) -out /root/cert.pem 2>/dev/null
}
served() { openssl s_client -connect localhost:8443 </dev/null 2>/dev/null | openssl x509 -noout -serial || true; }

postgres() {
    local bin
    bin=$(echo /usr/lib/postgresql/*/bin | awk '{print $NF}')
    id postgres >/dev/null 2>&1 || useradd --system postgres
    install -d -o postgres -m 755 /run/postgresql
    install -d -o postgres -m 700 /var/lib/shop
    runuser -u postgres -- "$bin/initdb" -D /var/lib/shop --auth=scram-sha-256 --pwfile=/etc/machine-id
    systemd-run --quiet --unit=shop-database -p User=postgres -p KillSignal=SIGINT \
        "$bin/postgres" -D /var/lib/shop -k /run/postgresql -c listen_addresses= -c fsync=off
    PGPASSWORD=$(cat /etc/machine-id)
    export PGPASSWORD
    soon 30 psql -qh /run/postgresql -U postgres -c "CREATE ROLE shop_reader LOGIN PASSWORD 'only for this trial'"
    psql -qh /run/postgresql -U postgres -c 'CREATE DATABASE shop'
}

system_layout() {
    systemd-tmpfiles --create mcpctl.conf
    mcpctl init /etc/mcpctl
    rm -f /etc/mcpctl/state.db /etc/mcpctl/audit.jsonl*
    openssl req -x509 -newkey rsa:2048 -nodes -keyout /root/ca.key -subj /CN=try-unit -days 90 -out /root/ca.pem 2>/dev/null
    certificate
    install -o mcpctl -m 600 /root/cert.pem /root/key.pem /etc/mcpctl
    echo 'only for this trial' | install -o mcpctl -m 600 /dev/stdin /etc/mcpctl/shop.password
    cat >/etc/mcpctl/config.yaml <<'END'
server:
  host: 127.0.0.1
  port: 8443
  workers: 2
  tls: {cert: cert.pem, key: key.pem}
  runtime_dir: /run/mcpctl
  state_file: /var/lib/mcpctl/state.db
auth: {sessions: {enabled: true}}
audit: {file: /var/log/mcpctl/audit.jsonl}
databases:
  shop: {host: /run/postgresql, dbname: shop, user: shop_reader, password_file: shop.password}
END
    mcpctl config check
    mcpctl user add alice
    echo 'a long one for this trial' | mcpctl user passwd alice --password-file -
    mcpctl token add --user alice --expiry 1d >/root/token
}

try_all() {
    local before said version

    { postgres && system_layout; } >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
    version=$(systemctl --version | awk 'NR == 1 {print $2}')
    say "        systemd $version"

    for unit in /etc/systemd/system/mcpctl*; do
        said=$(systemd-analyze verify --man=no "$unit" 2>&1 || true)
        check "verify has nothing to say of ${unit##*/}" test -z "$said"
        [[ -z $said ]] || say "$said"
    done
    check "its exposure is under 2.0" exposed_less_than 20

    # the server watches over itself more often than in production, since nobody wants to wait
    printf '[Service]\nWatchdogSec=3s\n' | drop_in watchdog
    check "started: systemd was told READY=1" timeout 60 systemctl start mcpctl
    is ActiveState active || { journal && exit 1; }
    check "the status says where it serves" says "serving at https://127.0.0.1:8443/mcp"
    check "it runs as mcpctl" of_process Uid "($(id -u mcpctl)[[:space:]]*){4}"
    check "without a capability" of_process CapBnd 0+
    check "it can get no new privilege" of_process NoNewPrivs 1
    check "system calls are filtered" of_process Seccomp 2
    check "it has two workers" test "$(workers | wc -l)" = 2
    check "/usr is read-only to it" read_only /usr
    check "/etc/mcpctl is read-only to it" read_only /etc/mcpctl
    check "homes are hidden from it" test "$(within ls -A /home && echo none)" = none
    check "/tmp is its own" test "$(within ls -A /tmp && echo none)" = none
    check "it answers a call" answers
    check "and has written it down" grep -q tool.called /var/log/mcpctl/audit.jsonl
    check "a password is checked, in a process of its own" signs_in
    check "the journal has its messages" grep -q 'serving at' <(journalctl -u mcpctl --no-pager)

    before=$(property WatchdogTimestampMonotonic)
    check "WATCHDOG=1 comes again and again" soon 5 later_than "$before"

    before=$(served)
    certificate
    install -o mcpctl -m 600 /root/cert.pem /root/key.pem /etc/mcpctl
    said=$(main_pid)
    check "reload succeeds" systemctl reload mcpctl
    check "a renewed certificate is served" not test "$before" = "$(served)"
    check "by the same process" test "$said" = "$(main_pid)"
    check "which answers" answers
    check "the status says what was read" says "config read again"

    sed -i 's/^  port: 8443/  prot: 8443/' /etc/mcpctl/config.yaml
    check "a broken config makes reload fail" not systemctl reload mcpctl
    check "what was in force stays in force" answers
    check "its state is active" is ActiveState active
    sed -i 's/^  prot: 8443/  port: 8443/' /etc/mcpctl/config.yaml
    check "a mended one is read" systemctl reload mcpctl
    echo 'log: {level: debug}' >>/etc/mcpctl/config.yaml
    kill -HUP "$(main_pid)"
    check "HUP is told as a reload, too" soon 5 says "changed: log"

    said=$(main_pid)
    kill -STOP "$(workers | head -n 1)"
    check "a stopped worker ends the signs of life, and systemd starts all again" soon 20 restarted "$said"
    check "since the watchdog has ended it" grep -q 'Watchdog timeout' <(journalctl -u mcpctl --no-pager)
    check "then it answers" soon 20 answers

    ask 'select pg_sleep(3)' >/tmp/slept &
    soon 5 sleeps
    kill -TERM "$(main_pid)"
    check "TERM: systemd was told STOPPING=1, while a call still runs" soon 2 is ActiveState deactivating
    check "that call gets its answer" wait $!
    check "it ends by itself, without a failure" soon 10 is Result success
    check "and is down" soon 10 is ActiveState inactive
    check "each worker has written its end" test "$(grep -c server.stopped /var/log/mcpctl/audit.jsonl)" -ge 2

    try_socket
    try_credentials
    if ((version >= 253)); then
        cp /opt/mcpctl/notify-reload.conf.example /etc/systemd/system/mcpctl.service.d/notify-reload.conf
        systemctl daemon-reload
        systemctl restart mcpctl
        check "notify-reload: reload succeeds" timeout 30 systemctl reload mcpctl
        check "notify-reload: it has read its config" says "config read again"
        sed -i 's/^  port: 8443/  prot: 8443/' /etc/mcpctl/config.yaml
        check "notify-reload: systemctl succeeds also with a broken config" timeout 30 systemctl reload mcpctl
        check "notify-reload: the status says so" says "config NOT read again"
        sed -i 's/^  prot: 8443/  port: 8443/' /etc/mcpctl/config.yaml
    else
        say "not tried: Type=notify-reload, which systemd $version does not know"
    fi

    check "the backup is due at 02:00" due mcpctl-backup '02:00:00'
    check "the check is due each day" due mcpctl-check '06:'
    try_oneshot mcpctl-check
    if mcpctl backup --help >/dev/null 2>&1; then
        ssh-keygen -q -t ed25519 -N '' -f /root/identity
        printf 'backup: {directory: /var/backups/mcpctl, recipients: [%s]}\n' "$(cut -d' ' -f1,2 /root/identity.pub)" \
            >>/etc/mcpctl/config.yaml
        try_oneshot mcpctl-backup
        check "there is a backup, which is mcpctl's alone" test "$(stat -c %U%a /var/backups/mcpctl/*)" = mcpctl600
    else
        say "not tried: mcpctl-backup.service, since there is no \`mcpctl backup\`"
    fi
    ((!failed))
}

exposed_less_than() { systemd-analyze security --offline=true --no-pager --threshold="$1" /etc/systemd/system/mcpctl.service; }
later_than() { (($(property WatchdogTimestampMonotonic) > $1)); }
restarted() { [[ $(main_pid) != 0 && $(main_pid) != "$1" ]] && is ActiveState active; }
sleeps() {
    local query="select query from pg_stat_activity where state = 'active' and pid <> pg_backend_pid()"
    [[ $(psql -qAth /run/postgresql -U postgres -c "$query") == *pg_sleep* ]]
}
due() { systemctl start "$1.timer" && [[ $(systemctl list-timers --no-pager "$1.timer") == *"$2"* ]]; }

came() { (($(grep -c answered /tmp/came) >= $1)); }
try_socket() {
    local said
    mkdir -p /etc/systemd/system/mcpctl.socket.d
    printf '[Socket]\nListenStream=\nListenStream=127.0.0.1:443\n' >/etc/systemd/system/mcpctl.socket.d/port.conf
    systemctl daemon-reload
    check "systemd listens on port 443" systemctl start mcpctl.socket
    check "who comes there starts the server, and is answered" answers 443
    check "it has that socket" says "serving at https://127.0.0.1:443/mcp"
    (while [[ ! -e /tmp/enough ]]; do answers 443 && echo answered; sleep 0.1; done) >/tmp/came 2>&1 &
    soon 20 came 1 || true
    check "it is restarted, twice" eval 'systemctl restart mcpctl && systemctl restart mcpctl'
    said=$(grep -c answered /tmp/came)
    check "who comes then is answered" soon 20 came "$((said + 1))"
    touch /tmp/enough
    wait $!
    check "and nobody was refused" not grep "Failed to connect" /tmp/came
    check "reload goes on with the socket" systemctl reload mcpctl
    systemctl stop mcpctl.socket mcpctl.service
    rm -r /etc/systemd/system/mcpctl.socket.d
    systemctl daemon-reload
}

try_credentials() {
    install -d -m 700 /root/secrets
    mv /etc/mcpctl/{shop.password,cert.pem,key.pem} /root/secrets
    cp -p /etc/mcpctl/secret.key /root/secrets # the commands seal with the source
    chown root /root/secrets/*
    sed -e "s,:/etc/mcpctl/,:/root/secrets/," -e "s,:/etc/letsencrypt.*fullchain,:/root/secrets/cert," \
        -e "s,:/etc/letsencrypt.*privkey,:/root/secrets/key," -e "s,^#\([LE]\),\1," \
        /opt/mcpctl/credentials.conf.example | drop_in credentials
    check "with root's own secrets as credentials it starts" timeout 60 systemctl start mcpctl
    is ActiveState active || journal
    check "serves the certificate, and logs in with the password" answers
    printf '[Socket]\nListenStream=/run/shop-password.sock\nSocketMode=0600\nAccept=yes\n' \
        >/etc/systemd/system/shop-password.socket
    printf '[Service]\nExecStart=/usr/bin/cat /root/secrets/shop.password\nStandardOutput=socket\n' \
        >/etc/systemd/system/shop-password@.service
    sed -i 's,:/root/secrets/shop.password,:/run/shop-password.sock,' \
        /etc/systemd/system/mcpctl.service.d/credentials.conf
    systemctl daemon-reload
    systemctl start shop-password.socket
    check "with a password that a program says, over a socket, it starts" timeout 60 systemctl restart mcpctl
    is ActiveState active || journal
    check "and logs in with it" answers
    cp -r /etc/systemd/system/mcpctl.service.d /etc/systemd/system/mcpctl-check.service.d
    sed -i '/^Watchdog/d' /etc/systemd/system/mcpctl-check.service.d/*
    systemctl daemon-reload
    check "the check is handed them, too" systemctl start mcpctl-check
    check "and looks at the certificate" grep -q 'fit together' <(journalctl -u mcpctl-check --no-pager)
    rm -r /etc/systemd/system/mcpctl-check.service.d
    check "the server cannot read root's copies" unreadable /root/secrets/key.pem
    rm /etc/systemd/system/mcpctl.service.d/credentials.conf
    mv /root/secrets/{shop.password,cert.pem,key.pem} /etc/mcpctl
    chown mcpctl /etc/mcpctl/*.pem /etc/mcpctl/shop.password
    systemctl daemon-reload
    systemctl restart mcpctl
}

try_oneshot() { # try_oneshot UNIT
    check "$1.service succeeds" systemctl start "$1"
    [[ $(property Result "$1.service") == success ]] || journal "$1"
}

# -- from outside -----------------------------------------------------------------------------------------------------

if [[ ${1:-} == --within ]]; then
    case $2 in
    machine) work=$3 venv=$4 make_machine "${@:5}" ;;
    checks) try_all ;;
    esac
    exit
fi

venv=$(realpath "${1:-$here/.venv}")
((EUID == 0)) || die "run it as root: it mounts, and makes namespaces"
for program in unshare nsenter openssl curl psql ip /lib/systemd/systemd systemd-analyze; do
    command -v "$program" >/dev/null || die "needs $program"
done
[[ -d $venv/lib/$(python_version /usr/bin/python3)/site-packages ]] || die "$venv is none for $(/usr/bin/python3 -V)"
cgroups=$(findmnt -nt cgroup2 -o TARGET | head -n 1)
[[ -n $cgroups ]] || die "needs cgroup2"
group=$cgroups$(sed -n 's/^0:://p' /proc/self/cgroup)/try-unit.$$
work=$(mktemp -d)
pid=

clean_up() {
    if [[ -n $pid ]]; then
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    for _ in {1..50}; do # its processes die with PID 1
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [[ -d $group ]] || break
        sleep 0.1
    done
    rmdir "$work"
}
trap clean_up EXIT
mkdir "$group"
(
    echo "$BASHPID" >"$group/cgroup.procs"
    exec unshare --mount --propagation private --pid --fork --kill-child --ipc --uts --net --cgroup \
        "$0" --within machine "$work" "$venv" "${@:2}"
) &
pid=$!
within_machine() {
    local first
    first=$(pgrep -P "$pid" | head -n 1)
    [[ -n $first ]] && nsenter -t "$first" -m -u -i -n -p -C -- "$@"
}
up() { within_machine systemctl is-active --quiet basic.target 2>/dev/null; }
soon 60 up || die "systemd did not come up"
within_machine /opt/mcpctl/try-unit.sh --within checks
