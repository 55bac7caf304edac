#!/bin/bash
# One machine of the test: what `unshare --net --uts --pid --mount --fork --mount-proc` runs.
# node.sh NAME ADDRESS FOLDER KEEP:… HIDE:…    /root, /tmp and /run are its own, the rest of the disk is read-only.
set -euo pipefail
name=$1 address=$2 folder=$3 keep=$4 hide=$5
hostname "$name"
mount --make-rprivate /
mount -t tmpfs tmpfs "$folder"
mkdir -p "$folder"/{root,tmp,run/sshd,empty,keep}
cp -r "$folder.home/." "$folder/root/"
chmod -R go= "$folder/root"
chmod 1777 "$folder/tmp"
IFS=: read -ra kept <<< "$keep"
for i in "${!kept[@]}"; do mkdir "$folder/keep/$i"; mount --bind "${kept[i]}" "$folder/keep/$i"; done
exec 7< "$folder" # the folder is hidden below, and is still needed
IFS=: read -ra hidden <<< "$hide"
mount -t tmpfs tmpfs /dev/shm
for own in tmp run root; do mount --bind "/proc/self/fd/7/$own" "/$own"; done
for path in "${hidden[@]}"; do if [[ -d $path ]]; then mount --bind /proc/self/fd/7/empty "$path"; fi; done
for i in "${!kept[@]}"; do mkdir -p "${kept[i]}"; mount --rbind "/proc/self/fd/7/keep/$i" "${kept[i]}"; done
mount -o remount,bind,ro /
until ip link show eth0 &> /dev/null; do sleep 0.1; done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "${address%.*}.1"
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec 7<&-
cd /
exec /usr/sbin/sshd -D -e -f /root/.ssh/sshd_config
