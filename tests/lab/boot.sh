#!/bin/bash
# Becomes PID 1 of a lab host: builds the host's own root file system, changes into it, starts Debian's runit.
#
#     unshare --mount --uts --ipc --net --pid --fork boot.sh FOLDER NAME VISIBLE...
#
# FOLDER has etc/ and home/ to begin with, and storage/ and nvidia/; VISIBLE folders appear read-only at their own path.
set -euo pipefail
folder=$1 name=$2
shift 2
root=$folder/root

mount --make-rprivate /
hostname "$name"
mkdir -p "$root"
mount -t tmpfs -o mode=755 root "$root"

read_only() { # SOURCE TARGET
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
}

for entry in /bin /sbin /lib /lib32 /lib64 /usr; do
    if [ -L "$entry" ]; then
        cp -P "$entry" "$root$entry"
    elif [ -d "$entry" ]; then
        mkdir -p "$root$entry"
        read_only "$entry" "$root$entry"
    fi
done

mkdir -p "$root"/{proc,sys,dev,etc,tmp,run/sshd,home,root,var/tmp,var/log,srv,opt/nvidia,mnt}
chmod 1777 "$root/tmp" "$root/var/tmp"
chmod 755 "$root/root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mkdir -p "$root"/dev/{pts,shm}
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"

cp -a /etc/. "$root/etc/"
rm -rf "$root"/etc/{shadow,gshadow,sudoers,sudoers.d,service,ld.so.preload} "$root"/etc/ssh/ssh_host_*
cp -a "$folder/etc/." "$root/etc/"
cp -a "$folder/home/." "$root/home/"
mkdir -p "$root/srv/storage"
mount --bind "$folder/storage" "$root/srv/storage"
if [ -d "$folder/nvidia" ]; then
    read_only "$folder/nvidia" "$root/opt/nvidia"
    echo /opt/nvidia >"$root/etc/ld.so.conf.d/nvidia.conf"
fi
for visible in "$@"; do
    mkdir -p "$root$visible"
    chmod 755 "$root$(dirname "$visible")"
    read_only "$visible" "$root$visible"
done

cd "$root"
mkdir -p mnt
pivot_root . mnt
umount -l /mnt
ldconfig
ip link set lo up

# This shell stays PID 1 and collects every orphan; runit keeps the services of /etc/service.
env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin runsvdir -P /etc/service >/dev/null 2>&1 &
trap : TERM INT HUP
touch /run/booted
while :; do wait || true; done
