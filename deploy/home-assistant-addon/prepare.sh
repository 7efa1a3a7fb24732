#!/bin/sh
# Completes the add-on for its Dockerfile: the wheel of this source tree, beside the hashes of what it needs, in cesar_mqtt/wheels.
#   prepare.sh [DIR]      DIR becomes an add-on repository: push it to a Git server, and add its address in Home Assistant
# Without DIR, copy the folder cesar_mqtt to /addons on the Home Assistant machine. PYTHON=... chooses the Python whose pip is used.
set -eu

repository=${1:-}
case $repository in
    '' | /*) ;;
    *) repository=$PWD/$repository ;;
esac
cd "$(dirname "$0")"
wheels=cesar_mqtt/wheels
mkdir -p "$wheels"
rm -f "$wheels"/*.whl
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" ../..
cp ../../pyproject.toml ../../requirements/build.txt ../../requirements/all.txt "$wheels/"
if test -z "$repository"; then
    echo "ready: copy $(pwd)/cesar_mqtt to /addons"
else
    mkdir -p "$repository"
    cp -R repository.yaml cesar_mqtt "$repository/"
    rm -f "$repository/$wheels/.gitignore"
    echo "ready: $repository is an add-on repository"
fi
