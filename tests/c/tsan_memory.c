/* rustc's ThreadSanitizer calls these instead of memcpy and its like; GCC's runtime does not have them. The plain functions
 * are intercepted by any runtime, so nothing is missed. */
#include <string.h>

void *__tsan_memcpy(void *to, const void *from, size_t bytes);
void *__tsan_memmove(void *to, const void *from, size_t bytes);
void *__tsan_memset(void *to, int value, size_t bytes);

__attribute__((weak)) void *__tsan_memcpy(void *to, const void *from, size_t bytes) {
    return memcpy(to, from, bytes);
}

__attribute__((weak)) void *__tsan_memmove(void *to, const void *from, size_t bytes) {
    return memmove(to, from, bytes);
}

__attribute__((weak)) void *__tsan_memset(void *to, int value, size_t bytes) {
    return memset(to, value, bytes);
}
