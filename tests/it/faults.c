// Writes to the datastore's files fail with the error number that the file named by FAULTS holds, while it is there; reads,
// too, when it is EIO.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int fault(int fd) {
    const char *name = getenv("FAULTS");
    char link[64], path[4096];
    if (!name || access(name, F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "datastore.sqlite3")) return 0;
    FILE *file = fopen(name, "r");
    int error = 0;
    if (!file) return 0;
    if (fscanf(file, "%d", &error) != 1) error = EIO;
    fclose(file);
    return error;
}

#define FAIL(fd, condition)             \
    do {                                \
        int before = errno;             \
        int error = fault(fd);          \
        if (error && (condition)) {     \
            errno = error;              \
            return -1;                  \
        }                               \
        errno = before;                 \
    } while (0)
#define NEXT(type, name, ...) ((type(*) __VA_ARGS__)dlsym(RTLD_NEXT, name))

ssize_t pread64(int fd, void *to, size_t count, off64_t offset) {
    FAIL(fd, error == EIO);
    return NEXT(ssize_t, "pread64", (int, void *, size_t, off64_t))(fd, to, count, offset);
}

ssize_t pread(int fd, void *to, size_t count, off_t offset) {
    return pread64(fd, to, count, offset);
}

ssize_t write(int fd, const void *from, size_t count) {
    FAIL(fd, 1);
    return NEXT(ssize_t, "write", (int, const void *, size_t))(fd, from, count);
}

ssize_t pwrite64(int fd, const void *from, size_t count, off64_t offset) {
    FAIL(fd, 1);
    return NEXT(ssize_t, "pwrite64", (int, const void *, size_t, off64_t))(fd, from, count, offset);
}

ssize_t pwrite(int fd, const void *from, size_t count, off_t offset) {
    return pwrite64(fd, from, count, offset);
}

int ftruncate64(int fd, off64_t length) {
    FAIL(fd, 1);
    return NEXT(int, "ftruncate64", (int, off64_t))(fd, length);
}

int ftruncate(int fd, off_t length) {
    return ftruncate64(fd, length);
}

int fsync(int fd) {
    FAIL(fd, 1);
    return NEXT(int, "fsync", (int))(fd);
}

int fdatasync(int fd) {
    FAIL(fd, 1);
    return NEXT(int, "fdatasync", (int))(fd);
}
