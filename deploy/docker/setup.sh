#!/bin/sh
# Makes the files of compose.yaml, in folders beside it: passwords, the access list, folders for the data, and .env with the
# user of both containers. With HOST (the name of this machine in your network) also certificates.
#   setup.sh [HOST]
# It can be run again: existing files are kept.
set -eu

cd "$(dirname "$0")"
umask 077
mkdir -p state/config state/mosquitto state/data
mkdir -p -m 755 audio

# mosquitto_passwd is part of mosquitto; without it, the one in the broker's image is used.
if command -v mosquitto_passwd >/dev/null; then
    ../mosquitto/make-passwords.sh state/config
else
    docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/../mosquitto:/scripts:ro" --volume "$PWD/state:/state" \
        --entrypoint /scripts/make-passwords.sh eclipse-mosquitto:2.0.22@sha256:212f89e1eaeb2c322d6441b64396e3346026674db8fa9c27beac293405c32b3c /state/config
fi
cp ../mosquitto/acl state/config/acl
chmod 600 state/config/acl

if [ $# -gt 0 ]; then
    ../mosquitto/make-certificates.sh state/certificates "mosquitto,$1"
fi

uid=$(id -u)
gid=$(id -g)
if [ "$uid" = 0 ]; then
    # No container runs as root: the files get a user id that has no account.
    uid=10001
    gid=10001
    chown -R "$uid:$gid" state
fi
printf 'CESAR_UID=%s\nCESAR_GID=%s\n' "$uid" "$gid" >.env
echo "ready: docker compose up --detach --build"
