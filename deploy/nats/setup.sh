#!/bin/sh
# Makes what compose.yaml needs, beside it: passwords, certificates, folders and .env.
#   setup.sh [HOST...]    HOST: names or IPv4 addresses by which clients reach this machine; localhost when left out
# It can be run again: existing passwords and certificates are kept.
set -eu

cd "$(dirname "$0")"
hosts=$(echo "${*:-localhost}" | tr ' ' ,)
umask 077
mkdir -p state/nats-1 state/nats-2 state/nats-3 state/attic state/cellar state/models
mkdir -p -m 755 audio
./make-passwords.sh state/config
../mosquitto/make-certificates.sh state/config/certificates "nats,nats-1,nats-2,nats-3,127.0.0.1,$hosts"
cp common.conf certificates.conf server.conf cluster.conf users.conf state/config/
. ../mosquitto/container-user.sh
printf '%s\n' "CESAR_UID=$uid" "CESAR_GID=$gid" >.env
echo "ready: docker compose up --detach --build"
