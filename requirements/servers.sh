#!/usr/bin/env bash
# Install what tests start or load and no Python package brings: a Redis server and the libraries
# of Mooncake's client for tiers, promtool (of the package prometheus) for metrics and alerts, a
# browser for the live page. Does nothing where there is no apt-get, where the user is not root, or
# where all of it is there; those tests are then skipped, or fail where CI is set.
set -euo pipefail

packages=(redis-server libibverbs1 librdmacm1 libnuma1 liburing2 libcurl4 prometheus chromium \
    chromium-driver)

command -v apt-get >/dev/null || exit 0
[ "$(id -u)" = 0 ] || exit 0
missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    # A library whose ABI changed with the size of time_t has a name of its own there.
    renamed=$(dpkg-query -W -f '${db:Status-Status}' "${package}t64" 2>/dev/null || true)
    [ "$state" = installed ] || [ "$renamed" = installed ] || missing+=("$package")
done
[ "${#missing[@]}" = 0 ] && exit 0

export DEBIAN_FRONTEND=noninteractive
echo "kvplug: installing ${missing[*]}"
# Installing a server starts it, which a test has no use for.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
