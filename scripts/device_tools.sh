#!/bin/sh
# Makes adb and sshd available to the tests of real devices: `scripts/device_tools.sh VENV` puts links (or, without
# root, unpacked copies) into VENV/device-tools.
set -eu
tools="$1/device-tools"
mkdir -p "$tools"

# package, program, where Debian puts it
provide() {
    if [ -x "$tools/$2" ]; then return; fi
    found=$(PATH="$PATH:/usr/sbin:/sbin" command -v "$2" || true)
    if [ -z "$found" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" > /dev/null
        found=$(PATH="$PATH:/usr/sbin:/sbin" command -v "$2" || true)
    fi
    if [ -z "$found" ] && command -v apt-get > /dev/null; then
        unpacked="$tools/$1.unpacked"
        mkdir -p "$unpacked"
        (cd "$unpacked" && apt-get download -qq "$1" && dpkg -x ./*.deb .)
        found="$unpacked$3"
    fi
    if [ -z "$found" ] || [ ! -x "$found" ]; then
        echo "$2 is missing and could not be installed: install the package $1" >&2
        exit 1
    fi
    ln -s "$(realpath "$found")" "$tools/$2"
}

provide openssh-server sshd /usr/sbin/sshd
if [ -x "$1/bin/python" ] && bundled=$("$1/bin/python" -c 'import adbutils; print(adbutils.adb_path())' 2> /dev/null) \
    && [ -x "$bundled" ] && ! command -v adb > /dev/null; then
    ln -sf "$bundled" "$tools/adb"
fi
provide adb adb /usr/bin/adb
# Android's shell and commands; without them the tests of a device that has these are skipped
(provide mksh mksh /bin/mksh) || true
(provide toybox toybox /bin/toybox) || true
