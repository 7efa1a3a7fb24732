#!/bin/sh
# Unpacks Debian's Docker, with Compose 2, into DIR; nothing is installed. Where both are there already, it does nothing.
#   unpack_docker.sh DIR
set -eu

if docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then exit 0; fi
dir=$1
[ ! -e "$dir/.unpacked" ] || exit 0
rm -rf "$dir"
mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
cd "$dir"
apt-get --quiet=2 download docker.io containerd runc
apt-get --quiet=2 download docker-cli 2>/dev/null || :  # a package of its own since Debian 13
if apt-cache show docker-compose | grep -q '^Version: 2'; then
    apt-get --quiet=2 download docker-compose
else
    # Debian 12 has Compose 1; that of Debian 13 runs there, too.
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive trixie main" >sources.list
    own="-o Dir::Etc::sourcelist=$PWD/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    # shellcheck disable=SC2086 # words
    apt-get --quiet=2 $own update && apt-get --quiet=2 $own download docker-compose
fi
for package in *.deb; do dpkg-deb --extract "$package" .; done
rm -rf ./*.deb lists cache
mkdir -p config
echo "{\"cliPluginsExtraDirs\": [\"$PWD/usr/libexec/docker/cli-plugins\"]}" >config/config.json
touch .unpacked
