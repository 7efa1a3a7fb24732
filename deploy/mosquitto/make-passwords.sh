#!/bin/sh
# Makes a random password for each user of the access list: hashed in FOLDER/passwords for mosquitto, and in plain text in
# FOLDER/USER.password for that user. Existing passwords are kept.
#   make-passwords.sh FOLDER [USER...]        (cesar producer homeassistant)
# The access list also has the users web, inbox and wyoming, for those who run these.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 FOLDER [USER...]" >&2
    exit 2
fi
folder=$1
shift
[ $# -gt 0 ] || set -- cesar producer homeassistant

umask 077
mkdir -p "$folder"
[ -e "$folder/passwords" ] || : >"$folder/passwords"

for user; do
    if [ -e "$folder/$user.password" ]; then
        echo "$user: has a password already"
        continue
    fi
    password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    # In a file that is hashed at once: an argument would be visible in the list of processes.
    printf '%s:%s\n' "$user" "$password" >"$folder/.new"
    mosquitto_passwd -U "$folder/.new"
    cat "$folder/.new" >>"$folder/passwords"
    rm "$folder/.new"
    printf '%s\n' "$password" >"$folder/$user.password"
    echo "$user: $folder/$user.password"
done
