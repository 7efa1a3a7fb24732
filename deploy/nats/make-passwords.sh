#!/bin/sh
# Makes a random password for each user of users.conf: in FOLDER/USER.conf for the server, and in FOLDER/USER.password for
# that user. Existing passwords are kept.
#   make-passwords.sh FOLDER
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
folder=$1
umask 077
mkdir -p "$folder"

for user in cesar producer reader homeassistant; do
    if [ -e "$folder/$user.password" ]; then
        echo "$user: has a password already"
        continue
    fi
    password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    printf 'password: "%s"\n' "$password" >"$folder/$user.conf"
    printf '%s\n' "$password" >"$folder/$user.password"
    echo "$user: $folder/$user.password"
done
