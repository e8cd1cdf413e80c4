#!/bin/bash
# Tries the Debian package in a bare Debian, as its administrator would: builds it there, installs it, makes a
# configuration, serves, asks, revokes, upgrades, removes and purges. One line a check; exits 1 where one fails.
#
#   sudo packaging/try-debian.sh [--suite bookworm] [--mirror URL] [--base FOLDER] [--packages FOLDER]
#
# --base FOLDER  a bare system to begin with, made there where it is missing, and left as it is; beside it, in
#                FOLDER.pip, what pip has fetched. Without it both are made anew, and removed.
# --packages FOLDER  two packages that were built before, mcpctl_VERSION-1* and mcpctl_VERSION.post1-1*: none is built
#
# Needs root, debootstrap, a Debian mirror and a package index. Nothing outside of a temporary folder is changed: it
# runs in its own mounts and processes, which end with it. It takes 5 minutes with a base, and no more than 40.
# shellcheck disable=SC2317 # checks are called by their names
set -euo pipefail

suite=bookworm mirror=http://deb.debian.org/debian base='' packages=''
while [ $# -gt 0 ]; do
  case $1 in
    --suite) suite=$2 && shift 2 ;;
    --mirror) mirror=$2 && shift 2 ;;
    --base) base=$(realpath -m "$2") && shift 2 ;;
    --packages) packages=$(realpath "$2") && shift 2 ;;
    --inside) break ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2 && exit 2 ;;
  esac
done
source_tree=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "try-debian.sh: run it as root" >&2 && exit 2; }

if [ "${1:-}" != --inside ]; then
  work=$(mktemp -d)
  trap 'rm -rf --one-file-system "$work"' EXIT
  # Own mounts and processes: whatever happens, both are gone with the last line.
  export TRY_SUITE=$suite TRY_MIRROR=$mirror TRY_BASE=${base:-$work/base} TRY_PACKAGES=$packages
  timeout -k 30 2400 unshare --mount --pid --fork --kill-child "$0" --inside "$work" </dev/null
  exit
fi

work=$2 suite=$TRY_SUITE mirror=$TRY_MIRROR base=$TRY_BASE packages=${TRY_PACKAGES:-$work/builder/out}
log=$work/log
failed=0

# -- saying what was found --------------------------------------------------------------------------------------------

check() { # check NAME COMMAND…: one line, and what the command said where it failed
  local name=$1 begun=$SECONDS status
  shift
  set +e # in a shell of its own, and in no condition: else bash goes on behind a command that fails
  (set -e && "$@") >"$log" 2>&1
  status=$?
  set -e
  if [ $status = 0 ]; then
    echo "ok      $name ($((SECONDS - begun)) s)"
  else
    echo "FAILED  $name"
    tail -n 30 "$log" | sed 's/^/        /'
    failed=1
  fi
}

must() { # the same, for what all else stands on
  check "$@"
  [ $failed = 0 ] || exit 1
}

refused() { if "$@"; then return 1; fi; }

keep() { printf '%s\n' "$2" >"$work/$1"; } # keep NAME VALUE, for the checks that come behind
kept() { cat "$work/$1"; }

# -- a system ---------------------------------------------------------------------------------------------------------

new_root() { # new_root FOLDER: a copy of the bare system, with what programs there expect
  cp -a --reflink=auto "$base" "$1"
  mount -t proc proc "$1/proc"
  mount --rbind /dev "$1/dev"
  rm -f "$1/etc/resolv.conf"
  cp -L /etc/resolv.conf /etc/hosts "$1/etc"
  printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" # packages start nothing
  chmod 755 "$1/usr/sbin/policy-rc.d"
}

within() { # within FOLDER COMMAND…: run there, as root, with an environment like sudo's
  local root=$1
  shift
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive chroot "$root" "$@"
}

here() { within "$work/root" "$@"; }
apt() { here apt-get -y -q "$@"; }
as_mcpctl() { here setpriv --reuid mcpctl --regid mcpctl --init-groups --no-new-privs --inh-caps=-all "$@"; }
as_nobody() { here setpriv --reuid nobody --regid nogroup --clear-groups --no-new-privs "$@"; }
as_postgres() { here setpriv --reuid postgres --regid postgres --init-groups "$@"; }
sql() { as_postgres psql -p "$(kept postgres_port)" -v ON_ERROR_STOP=1 -Atqc "$1" "${2:-shop}"; }

make_base() { # at its place only when it is whole
  if [ -d "$base" ]; then return; fi
  debootstrap --variant=minbase "$suite" "$base.part" "$mirror"
  rm -rf "$base.part"/var/cache/apt/archives/*.deb
  mv "$base.part" "$base"
}

# -- the packages -----------------------------------------------------------------------------------------------------

prepare_builder() {
  new_root "$work/builder"
  within "$work/builder" apt-get -q update
  within "$work/builder" apt-get -y -q install --no-install-recommends python3-venv dpkg-dev binutils
  # this machine's package index and certificates
  mkdir -p "$work/builder/etc/ssl/certs" "$work/builder/pip" "$work/builder/out" "$base.pip"
  cp -L /etc/ssl/certs/ca-certificates.crt "$work/builder/etc/ssl/certs/"
  if [ -e /etc/pip.conf ]; then cp /etc/pip.conf "$work/builder/etc"; fi
  mount --bind "$base.pip" "$work/builder/pip"
  mkdir "$work/builder/src"
  tar -C "$source_tree" --exclude=./.venv --exclude=./.git --exclude='./.*_cache' --exclude=./dist --exclude=node_modules \
    -cf - . | tar -C "$work/builder/src" --no-same-owner -xf -
}

build() { # build VERSION: that version of this source, as a package in $work/builder/out
  sed -i "s/^version = \".*\"/version = \"$1\"/" "$work/builder/src/pyproject.toml"
  sed -i "s/^__version__ = \".*\"/__version__ = \"$1\"/" "$work/builder/src/src/mcpctl/__init__.py"
  within "$work/builder" env PIP_CACHE_DIR=/pip PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DEFAULT_TIMEOUT=180 \
    ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} ${https_proxy:+https_proxy="$https_proxy"} \
    SOURCE_DATE_EPOCH=1767225600 DPKG_DEB_COMPRESSOR_LEVEL=1 /src/packaging/deb/build "/out$2"
}

built() { echo "$packages/mcpctl_$1-"*.deb; }

same_again() {
  build "$old" /again
  cmp "$(built "$old")" "$work"/builder/out/again/*.deb
}

give() { # the package of that version, where apt finds it
  cp "$(built "$1")" "$work/root/tmp/mcpctl-$1.deb"
}

# -- checks -----------------------------------------------------------------------------------------------------------

mode_of() { # mode_of MODE OWNER FILE…
  local want="$1 $2"
  shift 2
  for file in "$@"; do
    here stat -c '%a %U:%G %n' "$file"
    [ "$(here stat -c '%a %U:%G' "$file")" = "$want" ]
  done
}

nothing_is_made_before_init() {
  [ -z "$(ls -A "$work/root/etc/mcpctl")" ]
  refused as_mcpctl mcpctl serve --port 0
  [ ! -e "$work/root/etc/systemd/system/multi-user.target.wants/mcpctl.service" ]
}

pages_and_completion() {
  here test -e /usr/share/man/man1/mcpctl-token.1.gz
  here test -e /usr/share/man/man5/mcpctl.yaml.5.gz
  # shellcheck disable=SC2016 # that bash's variables
  local words='. /usr/share/bash-completion/completions/mcpctl; COMP_WORDS=(mcpctl token rev); COMP_CWORD=2
    _mcpctl_completion mcpctl; [ "${COMPREPLY[*]}" = revoke ]'
  as_nobody bash -c "$words"
}

make_files() { here mcpctl init; }

free_port() {
  here /opt/mcpctl/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_postgres() {
  apt install --no-install-recommends postgresql
  local cluster port
  port=$(free_port)
  keep postgres_port "$port"
  cluster=$(here pg_lsclusters -h | awk '{print $1; exit}')
  [ -n "$cluster" ] || { cluster=$(ls "$work/root/usr/lib/postgresql") && here pg_createcluster "$cluster" main; }
  here pg_conftool "$cluster" main set port "$port"
  here pg_ctlcluster "$cluster" main start
  here sh -c 'umask 077; od -An -tx1 -N24 /dev/urandom | tr -d " \n" >/root/shop.password'
  sql "CREATE DATABASE shop" postgres
  sql "CREATE TABLE orders AS SELECT n AS id, n * 1.5 AS total FROM generate_series(1, 1000) n"
  sql "CREATE ROLE shop_reader LOGIN NOSUPERUSER CONNECTION LIMIT 24 PASSWORD '$(cat "$work/root/root/shop.password")'"
  sql "GRANT SELECT ON orders TO shop_reader"
}

name_database() {
  here mcpctl database add shop --host 127.0.0.1 --port "$(kept postgres_port)" --dbname shop --user shop_reader \
    --password-file /root/shop.password
  here mcpctl config check
  here mcpctl database test
}

add_token() {
  here mcpctl user add alice
  here mcpctl token add --user alice --expiry 90d --note try >"$work/token"
  grep -qE '^mcp_[0-9a-z]{8}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}$' "$work/token"
}

start_server() { # the unit's ExecStart, as the unit's user; systemd makes /run/mcpctl, and is not there
  here install -d -o mcpctl -g mcpctl -m 0700 /run/mcpctl
  local port
  port=$(free_port)
  keep server_port "$port"
  # its own process, not that of a shell before it
  as_mcpctl sh -c 'echo $$ >/var/lib/mcpctl/try.pid && exec "$@"' sh \
    mcpctl --config /etc/mcpctl/config.yaml serve --http --port "$port" >"$work/server.log" 2>&1 &
  keep shell $!
  for _ in $(seq 300); do
    if ask health >/dev/null 2>&1; then
      mv "$work/root/var/lib/mcpctl/try.pid" "$work/server"
      return
    fi
    if ! kill -0 "$(kept shell)"; then break; fi
    sleep 0.1
  done
  cat "$work/server.log"
  return 1
}

stop_server() {
  local server
  server=$(kept server)
  kill -TERM "$server"
  for _ in $(seq 300); do
    if ! kill -0 "$server" 2>/dev/null; then return; fi
    sleep 0.1
  done
  return 1
}

runs_as_mcpctl() {
  local id status
  id=$(here id -u mcpctl)
  for status in "$work/root/proc/"[0-9]*/status; do
    # what systemd would start, and what that has started
    if tr '\0' ' ' <"${status%status}cmdline" | grep '/opt/mcpctl/bin'; then
      grep -E "^Uid:\s$id\s$id\s$id\s$id$" "$status"
    fi
  done
  tr '\0' ' ' <"$work/root/proc/$(kept server)/cmdline" | grep 'mcpctl --config /etc/mcpctl/config.yaml serve'
  mode_of 700 mcpctl:mcpctl /run/mcpctl
}

ask() { # ask health, or ask SQL: what the server answers, or its status where that is not 200
  here env PORT="$(kept server_port)" TOKEN="$(cat "$work/token" 2>/dev/null)" /opt/mcpctl/bin/python3 - "$1" <<'PYTHON'
import json, os, sys, urllib.error, urllib.request
base, said = f"http://127.0.0.1:{os.environ['PORT']}", sys.argv[1]
call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
call["params"] = {"name": "query_database", "arguments": {"query": said}}
headers = {"Authorization": f"Bearer {os.environ['TOKEN']}", "Content-Type": "application/json"}
headers["Accept"] = "application/json, text/event-stream"
asked = urllib.request.Request(f"{base}/health")
if said != "health":
    asked = urllib.request.Request(f"{base}/mcp", json.dumps(call).encode(), headers)
try:
    print(urllib.request.urlopen(asked, timeout=60).read().decode())
except urllib.error.HTTPError as refusal:
    print(refusal.code)
    sys.exit(1)
PYTHON
}

token_answers() {
  ask "SELECT count(*) AS n, sum(total) AS s FROM orders" >"$work/answer"
  cat "$work/answer"
  grep -q 750750 "$work/answer"
}

last_time() { # last_time EVENT: when the log has the last of these, in seconds
  here mcpctl audit tail -n 1 --event "$1" --json | here /opt/mcpctl/bin/python3 -c '
import datetime, json, sys
print(datetime.datetime.fromisoformat(json.loads(sys.stdin.readlines()[-1])["time"]).timestamp())'
}

revoke_reaches_the_query() {
  local running="SELECT count(*) FROM pg_stat_activity WHERE usename = 'shop_reader' AND query LIKE '%pg_sleep(50)%'"
  ask "SELECT pg_sleep(50)" >"$work/slow" 2>&1 &
  local slow=$!
  for _ in $(seq 100); do
    if [ "$(sql "$running")" = 1 ]; then break; fi
    sleep 0.1
  done
  [ "$(sql "$running")" = 1 ]
  here mcpctl token revoke "$(cut -d_ -f2 "$work/token")" --reason try 2>&1 | tee "$work/revoked"
  [ "$(sql "$running")" = 0 ]
  wait "$slow" || true
  cat "$work/slow"
  grep -q 'cut: 1 query, 0 backends left' "$work/revoked"
  local took
  took=$(here /opt/mcpctl/bin/python3 -c "print(round(1000 * ($(last_time query.cancelled) - $(last_time token.revoked))))")
  keep took "$took"
  [ "$took" -lt 1000 ]
  refused ask "SELECT 1"
}

log_is_whole() {
  here mcpctl audit verify
}

log_rotates() {
  # what is not there in a bare system comes with the package, since it recommends it
  here logrotate --force /etc/logrotate.d/mcpctl
  token_answers
  sleep 1 # names are by the second
  here logrotate --force /etc/logrotate.d/mcpctl
  token_answers
  here sh -c 'ls /var/log/mcpctl/audit.jsonl-*' | grep -c . | grep -qx 2
  log_is_whole
}

data() { # digests of what an upgrade must not touch
  here sh -c 'cd /etc/mcpctl && sha256sum *.yaml *.key *.password && stat -c "%a %U %n" *.yaml *.key *.password'
  here sh -c 'ls /var/lib/mcpctl/state.db'
}

upgrades() {
  data >"$work/before"
  give "$new"
  apt install "/tmp/mcpctl-$new.deb"
  data | diff "$work/before" -
  [ "$(here mcpctl --version)" = "mcpctl $new" ]
}

restarts() { stop_server && start_server; }

removes() {
  stop_server
  data >"$work/before"
  apt remove mcpctl
  [ ! -e "$work/root/usr/bin/mcpctl" ]
  [ ! -e "$work/root/opt/mcpctl" ]
  data | diff "$work/before" -
  here getent passwd mcpctl
}

purges() { apt purge mcpctl; }

left() { # everything of ours in the system: files by name and by owner, and entries of the system's own lists
  (cd "$work/root" && find . -xdev \( -path ./var/lib/apt -o -path ./var/lib/postgresql -o -path ./proc -o -path ./dev \) \
    -prune -o \( -name '*mcpctl*' ! -path './tmp/*' -o -nouser -o -nogroup \) -print)
  grep -l mcpctl "$work/root"/etc/{passwd,group,shadow,gshadow} || true
  here dpkg -l mcpctl 2>/dev/null | grep '^[^u]. *mcpctl ' || true
}

nothing_is_left() {
  left | tee "$work/left"
  [ ! -s "$work/left" ]
}

keeps_what_was_asked_for() {
  apt install "/tmp/mcpctl-$new.deb"
  here mcpctl init
  here mcpctl user add bob
  here install -o mcpctl -g mcpctl -m 0600 /etc/hostname /var/backups/mcpctl/a.tar.gz.age
  here touch /etc/mcpctl/keep-on-purge
  apt purge mcpctl
  left
  here sh -c 'ls /var/log/mcpctl/purged-*/audit.key /var/log/mcpctl/purged-*/audit.jsonl /var/backups/mcpctl/purged-*/a.tar.gz.age'
  mode_of 700 root:root /var/log/mcpctl
  [ ! -e "$work/root/etc/mcpctl" ]
  [ ! -e "$work/root/var/lib/mcpctl" ]
  apt install "/tmp/mcpctl-$new.deb"
  here mcpctl init
  log_is_whole
  apt purge mcpctl
  # a later purge leaves what an earlier one kept, and that alone
  here sh -c 'ls /var/log/mcpctl/purged-*/audit.key /var/backups/mcpctl/purged-*/a.tar.gz.age'
  [ "$(here sh -c 'ls /var/log/mcpctl /var/backups/mcpctl' | grep -vc purged- )" = 3 ] # two heads and a blank line
  rm -r "$work/root/var/log/mcpctl" "$work/root/var/backups/mcpctl"
  nothing_is_left
}

refuses_an_installation_by_hand() {
  here mkdir -p /opt/mcpctl
  here touch /opt/mcpctl/pyvenv.cfg
  refused apt install "/tmp/mcpctl-$old.deb"
  grep 'Move it away first' "$log" >"$work/told"
  here rm -r /opt/mcpctl
}

tells_systemd() { # a bare system has none, so its two programs are ones that only note what they are asked
  local program
  here mkdir -p /run/systemd/system
  for program in systemctl systemd-tmpfiles; do
    if [ -e "$work/root/usr/bin/$program" ]; then mv "$work/root/usr/bin/$program" "$work/root/root/"; fi
    printf '#!/bin/sh\necho "$*" >>/root/asked\n' >"$work/root/usr/bin/$program"
    chmod 755 "$work/root/usr/bin/$program"
  done
  printf '#!/bin/sh\nexit 104\n' >"$work/root/usr/sbin/policy-rc.d"
  apt install "/tmp/mcpctl-$old.deb"
  cat "$work/root/root/asked"
  refused grep 'start' "$work/root/root/asked"
  apt install "/tmp/mcpctl-$new.deb"
  grep -x 'try-restart mcpctl.service' "$work/root/root/asked"
  refused grep '^stop' "$work/root/root/asked"
  apt purge mcpctl
  grep -x 'stop mcpctl.service' "$work/root/root/asked"
  grep -x 'stop mcpctl-backup.timer' "$work/root/root/asked"
}

# -- the walk ---------------------------------------------------------------------------------------------------------

old=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$source_tree/pyproject.toml")
new=$old.post1

must "a bare $suite" make_base
if [ -z "$TRY_PACKAGES" ]; then
  must "a system to build in" prepare_builder
  must "the package is built" build "$old" ""
  check "built again it is the same, bit for bit" same_again
  must "a newer version is built" build "$new" ""
fi
must "another bare $suite" new_root "$work/root"
give "$old"
must "apt knows the mirror" apt update
must "it installs, with what it depends on" apt install "/tmp/mcpctl-$old.deb"
check "folders are the service's alone" mode_of 700 mcpctl:mcpctl /etc/mcpctl /var/lib/mcpctl /var/log/mcpctl /var/backups/mcpctl
check "the program is root's, and everybody may run it" as_nobody mcpctl --version
check "its mode is 755" mode_of 755 root:root /opt/mcpctl/bin/mcpctl
check "man pages and completion are where the system looks" pages_and_completion
check "nothing is made, and nothing is served, before init" nothing_is_made_before_init
must "mcpctl init" make_files
check "every file is 0600, and the service's" mode_of 600 mcpctl:mcpctl \
  /etc/mcpctl/{config,tokens,users,tenants}.yaml /etc/mcpctl/{secret,audit}.key
must "PostgreSQL of $suite" start_postgres
must "mcpctl database add" name_database
must "mcpctl user add, mcpctl token add" add_token
must "mcpctl serve, as mcpctl" start_server
check "no process of it is root's" runs_as_mcpctl
check "the token is answered" token_answers
check "the audit log is whole" log_is_whole
check "logrotate moves it, and it stays whole" log_rotates
check "a newer version installs beside the running server, and no file changes" upgrades
check "the server starts again" restarts
check "the old token is answered" token_answers
check "mcpctl token revoke reaches the running query" revoke_reaches_the_query
echo "        $(kept took || echo ?) ms after token.revoked; $(grep -o 'cut: .*' "$work/revoked" || true)"
check "the audit log is whole, over both versions" log_is_whole
check "apt remove keeps the data" removes
check "apt purge" purges
check "nothing is left" nothing_is_left
check "keep-on-purge keeps the log with its key, and the backups" keeps_what_was_asked_for
check "an installation by hand in /opt/mcpctl is not mixed with ours" refuses_an_installation_by_hand

check "systemd restarts on an upgrade what runs, and starts nothing" tells_systemd

[ $failed = 0 ] && echo "all is well" || echo "something FAILED"
exit $failed
