#!/bin/sh
# Read by the two setup.sh, in their folder: sets uid and gid of the containers, and gives them the folder state.
uid=$(id -u)
gid=$(id -g)
if [ "$uid" = 0 ]; then
    # No container runs as root: the files get a user id that has no account.
    uid=10001
    gid=10001
    chown -R "$uid:$gid" state
fi
