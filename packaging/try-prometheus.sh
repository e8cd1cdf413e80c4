#!/usr/bin/env bash
# Try the monitoring for real: Debian's Prometheus and Alertmanager scrape a server with two workers over TLS, every query
# of the dashboard is asked, and each alert is made to fire once by what it is for. One line an alert; exits 1 where one
# does not fire, or fires before its cause. Takes some seven minutes, needs nothing but loopback, leaves nothing behind.
#
#   apt-get install prometheus prometheus-alertmanager curl jq openssl
#   packaging/try-prometheus.sh            # MCPCTL=/usr/bin/mcpctl for another than the one of this folder's .venv
#
# The rules are those of prometheus/mcpctl.rules.yaml with shorter times (5m is 20s, a week is a minute, no `for` is
# longer than 10s), since nobody waits a week. Only systemd's units are told of by a stand-in for node_exporter.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mcpctl=${MCPCTL:-$here/../.venv/bin/mcpctl}
python=$(dirname "$(readlink -f "$mcpctl")")/python3
work=$(mktemp -d)
chmod 755 "$work"
home=$work/home
pids=() stopped=() failed=0 fired=0
export MCPCTL_CONFIG=$home/config.yaml

say() { printf '%s\n' "$*"; }
clean_up() {
    for pid in "${stopped[@]}"; do kill -CONT "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

for program in prlimit prometheus promtool prometheus-alertmanager amtool curl jq openssl "$mcpctl" "$python"; do
    command -v "$program" >/dev/null || { say "there is no $program"; exit 3; }
done

# -- parts ------------------------------------------------------------------------------------------------------------

free_port() { "$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# until_true SECONDS COMMAND…: wait until the command succeeds
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.3
    done
}

sql() { "$python" - "$admin" "$@" <<'PYTHON'; }
import sys
import psycopg
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    for text in sys.argv[2:]:
        found = connection.execute(text)
        if found.description:
            print("\n".join(str(row[0]) for row in found))
PYTHON

# ask TOKEN STATEMENT [DATABASE]: the answer's body; nothing is an error here
ask() {
    jq -nc --arg q "$2" --arg d "${3:-shop}" \
        '{jsonrpc: "2.0", id: 1, method: "tools/call", params: {name: "query_database", arguments: {query: $q, database: $d}}}' |
        curl -sS --max-time 60 --cacert "$work/cert.pem" -H "Authorization: Bearer $1" -H 'Content-Type: application/json' \
            -H 'Accept: application/json' --data-binary @- "$url" 2>&1 || true
}

# many NUMBER TOKEN STATEMENT [DATABASE]: so many calls at once, and wait for them
many() {
    local calls=()
    for _ in $(seq "$1"); do
        ask "${@:2}" >/dev/null &
        calls+=($!)
    done
    wait "${calls[@]}"
}

token() { "$mcpctl" token add "$@" 2>/dev/null; }
id_of() { cut -d_ -f2 <<<"$1"; }
workers() { "$mcpctl" status --json 2>/dev/null | jq -r '.servers[0].pids[]'; }

# query EXPRESSION: how many series answer; fails where Prometheus refuses it
query() {
    curl -sS --data-urlencode "query=$1" "$prometheus/api/v1/query" |
        jq -re 'if .status == "success" then .data.result | length else error(.error) end'
}
has_fired() { [[ $(query "count_over_time(ALERTS{alertname=\"$1\", alertstate=\"firing\"}[1h])") != 0 ]]; }

quiet() {
    if has_fired "$1"; then
        say "EARLY    $1 has fired before its cause"
        failed=$((failed + 1))
    fi
}

# fires ALERT CAUSE
tried=" "
fires() {
    local begun=$SECONDS
    tried+="$1 "
    if until_true 90 has_fired "$1"; then
        fired=$((fired + 1))
        printf 'fires    %-26s %3d s after: %s\n' "$1" $((SECONDS - begun)) "$2"
    else
        failed=$((failed + 1))
        printf 'SILENT   %-26s %3d s after: %s\n' "$1" $((SECONDS - begun)) "$2"
    fi
}

# -- PostgreSQL, mcpctl, Prometheus, Alertmanager -----------------------------------------------------------------------

say "starting PostgreSQL, by mcpctl demo …"
"$mcpctl" demo --port 0 --json >"$work/demo.json" 2>"$work/demo.log" &
pids+=($!)
until_true 120 test -s "$work/demo.json" || { cat "$work/demo.log"; exit 1; }
admin=$(jq -r .dsn "$work/demo.json")
socket=$("$python" -c 'import sys; from psycopg.conninfo import conninfo_to_dict as d; print(d(sys.argv[1])["host"])' "$admin")
sql 'CREATE TABLE old_passwords (password text)' 'CREATE DATABASE acme' 'REVOKE ALL ON DATABASE acme FROM PUBLIC'

say "starting mcpctl with two workers and a certificate of one day …"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost \
    -addext subjectAltName=IP:127.0.0.1 -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null
chmod 600 "$work/key.pem"
"$mcpctl" init "$home" >/dev/null 2>&1
(umask 077 && printf '%s\n' "$admin" >"$home/admin.dsn")
cat >"$home/config.yaml" <<YAML
server: {port: 0, workers: 2, tls: {cert: $work/cert.pem, key: $work/key.pem}}
metrics: {port: 0}
databases:
  shop: {host: "$socket", dbname: shop, roles: per_user, default: true}
  acme: {host: "$socket", dbname: acme, roles: per_user}
limits:
  {rate: 100000, burst: 100000, concurrent: 200, failed_sign_ins: 100000, connections: 8, max_rows: 200000, max_bytes: 16MiB,
   users: {named: {slow: {rate: 1, burst: 1}}}}
canaries: {tables: [shop.public.old_passwords]}
backup: {directory: $work/backups}
YAML
"$mcpctl" tenant add acme --database acme >/dev/null 2>&1
"$mcpctl" user add acme-ann --tenant acme >/dev/null 2>&1
for user in ann slow; do
    "$mcpctl" user add "$user" >/dev/null 2>&1
    "$mcpctl" user grant "$user" --database shop --access read --apply >"$work/grant.log" 2>&1 || { cat "$work/grant.log"; exit 1; }
done
"$mcpctl" user grant acme-ann --database acme --access read --apply >"$work/grant.log" 2>&1 || { cat "$work/grant.log"; exit 1; }
ann=$(token --user ann --expiry 12h)
tenants=$(token --user acme-ann --expiry 90d)

# a disk that hangs while the file slow-disk is there, for McpctlAuditLag
mkdir "$work/hanging"
cat >"$work/hanging/sitecustomize.py" <<PYTHON
import os, time
real = os.fdatasync
def fdatasync(fd):
    while os.path.exists("$work/slow-disk"):
        time.sleep(0.2)
    real(fd)
os.fdatasync = fdatasync
PYTHON
(
    ulimit -n 400
    PYTHONPATH=$work/hanging exec "$mcpctl" serve
) 2>"$work/server.log" >/dev/null &
server=$!
pids+=("$server")
until_true 60 grep -q '^serving at' "$work/server.log" || { cat "$work/server.log"; exit 1; }
url=$(sed -n 's/^serving at //p' "$work/server.log")
scraped=$(sed -n 's|.*metrics at http://\(.*\)/metrics.*|\1|p' "$work/server.log" | tail -1)

promtool check rules "$here/prometheus/mcpctl.rules.yaml" >/dev/null
promtool test rules "$here/prometheus/mcpctl.rules.test.yaml" "$here/prometheus/mcpctl.rules.week.test.yaml" >/dev/null
amtool check-config "$here/prometheus/alertmanager.yml" >/dev/null
say "ok       promtool check rules, promtool test rules, amtool check-config"

sed -E -e 's/\[(5|10)m\]/[20s]/g; s/\[15m\]/[40s]/g; s/\[1h\]/[20s]/g; s/offset 7d/offset 60s/g; s/offset 15m/offset 40s/g' \
    -e 's/for: (2m|5m)/for: 10s/; s/for: (1m|10m|1h)/for: 2s/' "$here/prometheus/mcpctl.rules.yaml" >"$work/mcpctl.rules.yaml"
port=$(free_port) alerts=$(free_port) node=$(free_port)
sed -E -e "s/127.0.0.1:9464/$scraped/; s/:9093/:$alerts/; s/:9100/:$node/; s/scrape_interval: 15s/scrape_interval: 3s/; s/evaluation_interval: 15s/evaluation_interval: 1s/" \
    "$here/prometheus/prometheus.yml" >"$work/prometheus.yml"
mkdir "$work/node"
(cd "$work/node" && exec "$python" -m http.server --bind 127.0.0.1 "$node" >/dev/null 2>&1) &
pids+=($!)
units() {
    printf 'node_systemd_unit_state{name="mcpctl-%s.service",state="failed"} %d\n' check "$1" backup "$1" >"$work/node/new"
    mv "$work/node/new" "$work/node/metrics"
}
units 0
prometheus-alertmanager --config.file="$here/prometheus/alertmanager.yml" --storage.path="$work/alerts" --log.level=error \
    --web.listen-address="127.0.0.1:$alerts" --cluster.listen-address= >"$work/alertmanager.log" 2>&1 &
pids+=($!)
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/tsdb" --log.level=error \
    --web.listen-address="127.0.0.1:$port" >"$work/prometheus.log" 2>&1 &
pids+=($!)
prometheus=http://127.0.0.1:$port
scrapes() { [[ $(query 'up{job="mcpctl"} == 1') == 1 ]]; }
until_true 60 scrapes || { cat "$work/prometheus.log"; exit 1; }
say "ok       $(prometheus --version 2>&1 | head -1 | cut -d' ' -f1-3) scrapes $scraped"

# -- each alert ---------------------------------------------------------------------------------------------------------

many 4 "$ann" 'SELECT count(*) FROM customers'
ask "$tenants" 'SELECT 1' acme >/dev/null
fires McpctlCertificateExpires 'a certificate of one day'
fires McpctlCertificateEnds 'the same'
fires McpctlTokenExpires 'a token of 12 hours'
fires McpctlBackupOld 'backup.directory is named, and nobody makes one'

quiet McpctlConfigChanged
printf '# changed\n' >>"$home/config.yaml"
fires McpctlConfigChanged 'a line was added to config.yaml'

quiet McpctlDeadTokenInUse
dead=$(token --user ann --expiry 30d)
"$mcpctl" token revoke "$(id_of "$dead")" >/dev/null 2>&1
ask "$dead" 'SELECT 1' >/dev/null
fires McpctlDeadTokenInUse 'a revoked token was used'

quiet McpctlWrongSecrets
guessed=$("$python" - "$ann" <<'PYTHON'
import sys
from mcpctl.identity.tokens import base62, signed
print(signed(f"mcp_{sys.argv[1].split('_')[1]}_{base62(1, 43)}"))
PYTHON
)
many 8 "$guessed" 'SELECT 1'
fires McpctlWrongSecrets 'wrong secrets with the id of a token'

quiet McpctlLimited
slow=$(token --user slow --expiry 30d)
for _ in 1 2 3; do many 4 "$slow" 'SELECT 1'; sleep 1; done
fires McpctlLimited 'a user with one call a second makes more'

quiet McpctlTokenBlocked
thief=$(token --user ann --expiry 30d)
ask "$thief" 'SELECT * FROM old_passwords' >/dev/null
fires McpctlTokenBlocked 'a canary table was read'

quiet McpctlErrors
for _ in 1 2 3; do many 20 "$ann" 'SELECT 1/0'; done
fires McpctlErrors '60 calls that PostgreSQL answers with an error'

quiet McpctlTenantErrors
for _ in 1 2; do many 20 "$tenants" 'SELECT 1/0' acme; done
fires McpctlTenantErrors "the same of a tenant's user"

quiet McpctlRefusedCalls
for _ in 1 2; do many 20 "$ann" 'DELETE FROM customers'; done
fires McpctlRefusedCalls '40 statements that are no questions'

quiet McpctlUnusualRows
a_minute_ago() { [[ $(query 'increase(mcpctl_call_rows_total[20s] offset 60s)') != 0 ]]; }
until_true 120 a_minute_ago
many 3 "$ann" 'SELECT generate_series(1, 100000)'
fires McpctlUnusualRows '300,000 rows were read, a minute ago none'

quiet McpctlSlowCalls
many 4 "$ann" 'SELECT pg_sleep(7)'
fires McpctlSlowCalls 'four calls of seven seconds'

quiet McpctlBudgetFull
second=$(token --user slow --expiry 30d)
third=$(token --user ann --expiry 30d)
many 24 "$ann" 'SELECT pg_sleep(6)' &
waiting=($!)
many 24 "$third" 'SELECT pg_sleep(6)' &
waiting+=($!)
ask "$second" 'SELECT pg_sleep(6)' >/dev/null &
waiting+=($!)
fires McpctlBudgetFull '49 calls of six seconds on eight connections'
wait "${waiting[@]}"

quiet McpctlBackendLeft
left=$(token --user ann --expiry 30d)
ask "$left" "SELECT pg_sleep(30), 'left'" >/dev/null &
waiting=($!)
backend() { pid=$(sql "SELECT pid FROM pg_stat_activity WHERE query LIKE '%''left''%' AND pid <> pg_backend_pid()" | head -1); [[ -n $pid ]]; }
until_true 20 backend
stopped+=("$pid")
kill -STOP "$pid"
"$mcpctl" token revoke "$(id_of "$left")" >/dev/null 2>&1 || true
fires McpctlBackendLeft 'a token was revoked whose backend is stopped'
kill -CONT "$pid"
wait "${waiting[@]}"

quiet McpctlSignInsRefused
for _ in $(seq 6); do many 20 rubbish 'SELECT 1'; done
fires McpctlSignInsRefused '120 credentials that are none'

quiet McpctlTurnedAway
"$python" - "$url" <<'PYTHON' &
import contextlib, socket, sys, time
from urllib.parse import urlsplit
where = urlsplit(sys.argv[1])
held = []
until = time.monotonic() + 10
while time.monotonic() < until:
    with contextlib.suppress(OSError):
        while len(held) < 980:
            held.append(socket.create_connection((where.hostname, where.port), timeout=1))
    time.sleep(0.5)
PYTHON
waiting=($!)
fires McpctlTurnedAway '980 silent connections, of 400 descriptors a worker'
wait "${waiting[@]}"

quiet McpctlDescriptors
victim=$(workers | head -1)
open=$(find "/proc/$victim/fd" -mindepth 1 | wc -l)
prlimit --pid "$victim" --nofile=$((open * 100 / 85)):
fires McpctlDescriptors "a worker may have no more than $((open * 100 / 85)) descriptors, by prlimit"
prlimit --pid "$victim" --nofile=400:

quiet McpctlLocked
"$mcpctl" lockdown --reason trial >/dev/null 2>&1 || "$mcpctl" lockdown >/dev/null 2>&1
fires McpctlLocked 'mcpctl lockdown'
"$mcpctl" lockdown --lift >/dev/null 2>&1

quiet McpctlFilesBroken
cp -p "$home/tokens.yaml" "$work/tokens.yaml"
printf 'rubbish\n' >>"$home/tokens.yaml"
fires McpctlFilesBroken 'a line of rubbish in tokens.yaml'
cp -p "$work/tokens.yaml" "$home/tokens.yaml"

quiet McpctlAuditLag
touch "$work/slow-disk"
ask "$ann" 'SELECT 1' >/dev/null
fires McpctlAuditLag 'fdatasync hangs'
rm "$work/slow-disk"

quiet McpctlAuditFailing
mv "$home/audit.jsonl" "$work/audit.jsonl"
mkdir "$home/audit.jsonl"
many 6 "$ann" 'SELECT 1'
fires McpctlAuditFailing 'a folder stands where the audit log should'
rmdir "$home/audit.jsonl"
mv "$work/audit.jsonl" "$home/audit.jsonl"
many 6 "$ann" 'SELECT 1'

quiet McpctlWorkerHangs
victim=$(workers | head -1)
stopped+=("$victim")
kill -STOP "$victim"
fires McpctlWorkerHangs 'kill -STOP of a worker'
kill -CONT "$victim"
fires McpctlSlow 'the same, when it goes on'  # not looked at before: a busy machine is slow by itself

quiet McpctlWorkerRestarts
another() { now=$(workers | head -1); [[ -n $now && $now != "$victim" ]]; }
for _ in 1 2 3 4; do
    victim=$(workers | head -1)
    kill -KILL "$victim"
    until_true 30 another
    sleep 2
done
fires McpctlWorkerRestarts 'kill -KILL of a worker, four times'

quiet McpctlCheckFailed
quiet McpctlBackupFailed
units 1
fires McpctlCheckFailed 'a stand-in for node_exporter says that the unit failed'
fires McpctlBackupFailed 'the same'

quiet McpctlDatabaseDown
quiet McpctlConnectionErrors
sql "SELECT 1" >/dev/null
postmaster=$(head -1 "$(dirname "$socket")"/data/postmaster.pid)
kill -INT "$postmaster"
for _ in 1 2 3; do many 6 "$ann" 'SELECT 1'; sleep 1; done
fires McpctlDatabaseDown 'PostgreSQL was stopped'
fires McpctlConnectionErrors 'the same, and calls go on'

# -- the dashboard, now that there is something of everything -----------------------------------------------------------

asked=0
while IFS= read -r expression; do
    asked=$((asked + 1))
    expression=${expression//\$__rate_interval/10m}
    expression=${expression//\$__range/1h}
    expression=${expression//\$instance/.*}
    if ! found=$(query "$expression"); then
        say "REFUSED  $expression"
        failed=$((failed + 1))
    elif [[ $found == 0 ]]; then
        say "EMPTY    $expression"
        failed=$((failed + 1))
    fi
done < <(jq -r '.panels[].targets[]?.expr' "$here/grafana/mcpctl.json")
say "asked    $asked queries of the dashboard"

quiet McpctlDown
kill "$server"
wait "$server" 2>/dev/null || true
fires McpctlDown 'the server was stopped'

known() { curl -sS "http://127.0.0.1:$alerts/api/v2/alerts" | jq -e 'any(.[]; .labels.alertname == "McpctlDown")'; }
if until_true 30 known; then
    say "ok       Alertmanager has heard of it"
else
    say "SILENT   Alertmanager has heard of nothing"
    failed=$((failed + 1))
fi

while IFS= read -r alert; do
    if [[ $tried != *" $alert "* ]]; then
        say "UNTRIED  $alert"
        failed=$((failed + 1))
    fi
done < <(sed -n 's/^ *- alert: //p' "$here/prometheus/mcpctl.rules.yaml")
say "$fired alerts have fired, $failed faults, $SECONDS s"
[[ $failed == 0 ]]
