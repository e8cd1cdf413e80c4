#!/bin/sh
# Prints the path of a PgBouncer that runs here: the installed one, or Debian's package unpacked into a folder of ours.
#
#   MCPCTL_TEST_PGBOUNCER_DIR   where it is unpacked, a folder that the user who runs it can read
#
# Exit 0: its path is on stdout, what LD_LIBRARY_PATH has to be on the second line. 3: it cannot be had on this machine,
# the reason is on stderr (tests skip with it). Nothing is installed, and root is not needed.
set -eu

target=${MCPCTL_TEST_PGBOUNCER_DIR:?}

unavailable() {
    echo "$1" >&2
    exit 3
}

runs() {
    LD_LIBRARY_PATH=${2:-} "$1" --version >/dev/null 2>&1
}

for found in "$(command -v pgbouncer || :)" /usr/sbin/pgbouncer; do
    if [ -x "$found" ] && runs "$found"; then
        printf '%s\n\n' "$found"
        exit 0
    fi
done

if [ ! -x "$target/usr/sbin/pgbouncer" ]; then
    [ "${MCPCTL_TEST_PGBOUNCER:-}" != off ] || unavailable "PgBouncer is not installed and MCPCTL_TEST_PGBOUNCER is off"
    for needed in apt-get dpkg; do
        command -v "$needed" >/dev/null 2>&1 || unavailable "PgBouncer is not installed, and there is no $needed"
    done
    new=$(mktemp -d "${TMPDIR:-/tmp}/pgbouncer-XXXXXX")
    trap 'rm -rf "$new"' EXIT
    wanted=$(apt-cache depends pgbouncer 2>/dev/null | sed -n 's/^ *Depends: \(libc-ares2\|libevent[^ ]*\)$/\1/p')
    # shellcheck disable=SC2086 # a list of names
    (cd "$new" && apt-get -q download pgbouncer $wanted) >/dev/null 2>&1 || unavailable "apt-get cannot download PgBouncer"
    for package in "$new"/*.deb; do
        dpkg -x "$package" "$new/root"
    done
    chmod -R go+rX "$new/root"
    mkdir -p "$(dirname "$target")" && mv -T "$new/root" "$target" 2>/dev/null || [ -x "$target/usr/sbin/pgbouncer" ] ||
        unavailable "$target cannot be written: set MCPCTL_TEST_PGBOUNCER_DIR"
fi
libraries=$(find "$target/usr/lib" -name 'libcares.so.2' -exec dirname {} \; | head -1)
runs "$target/usr/sbin/pgbouncer" "$libraries" || unavailable "Debian's PgBouncer does not run here"
printf '%s\n%s\n' "$target/usr/sbin/pgbouncer" "$libraries"
