/* What plugins in C do by themselves: rows of any layout and element type as floats, memory of the host's, errors, a config
 * of one number. */
#ifndef HELPERS_H
#define HELPERS_H

#include "kvhook.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Writes a message, cut at what the caller's buffer takes, and gives `status`. Messages are ASCII, so that any cut is a whole
 * character. */
static inline KvhStatus fail(KvhText *error, KvhStatus status, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    const int written = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (error != NULL && error->data != NULL && written > 0) {
        size_t length = (size_t)written < sizeof text ? (size_t)written : sizeof text - 1;
        length = length < error->capacity ? length : error->capacity;
        memcpy(error->data, text, length);
        error->length = length;
    }
    return status;
}

/* Whether a struct of the host's is there, with all its fields up to `field`. */
#define HAS(pointer, type, field) ((pointer) != NULL && KVH_HAS(pointer, type, field))

/* What a function answers that was called without what it needs: a mistake in an engine must not crash its server. */
static inline KvhStatus not_called_right(KvhText *error, const char *function) {
    return fail(error, KVH_ERR_INVALID_ARGUMENT, "%s was called with a null argument, or one of another version", function);
}

/* Reads a config that has one key: `key=number` or `{"key": number}`. An empty config leaves `*value` as it is.
 * Gives 0 when it is something else, or the number is not from `least` to `most`. */
static inline int read_number(KvhStr config, const char *key, double least, double most, double *value) {
    char text[128];
    if (config.length >= sizeof text) {
        return 0;
    }
    /* Quotes, braces and spaces are left out; what remains is `key=number` or `key:number`. */
    size_t length = 0;
    for (size_t i = 0; i < config.length; i++) {
        const char c = config.data[i];
        if (c == '\0') {
            return 0;
        }
        if (strchr("\"{} \t\r\n", c) == NULL) {
            text[length++] = c;
        }
    }
    text[length] = '\0';
    if (length == 0) {
        return 1;
    }
    const size_t key_length = strlen(key);
    if (strncmp(text, key, key_length) != 0 || (text[key_length] != '=' && text[key_length] != ':')) {
        return 0;
    }
    const char *number = text + key_length + 1;
    char *end = NULL;
    const double read = strtod(number, &end);
    if (end == number || *end != '\0' || !(read >= least && read <= most)) {
        return 0;
    }
    *value = read;
    return 1;
}

/* Borrows memory from the host, which frees it: KVH_MEMORY_CALL when the call ends, KVH_MEMORY_TICKET when the plan of
 * sequence `sequence` is carried out or dropped. Null, and `error` is written, when there is none. */
static inline void *borrow(const KvhMemory1 *memory, KvhHostState *host, KvhCall *call, uint32_t kind, uint64_t sequence,
                           uint64_t bytes, KvhText *error) {
    const KvhAllocation request = {
        .struct_size = sizeof request,
        .kind = kind,
        .sequence = sequence,
        .bytes = bytes > 0 ? bytes : 1,
        .alignment = 8,
    };
    void *lent = NULL;
    return memory->allocate(host, call, &request, &lent, error) == KVH_OK ? lent : NULL;
}

/* Whether this file reads and writes elements of a type. */
static inline int is_readable(KvhDtype dtype) {
    const int is_float = dtype.code == KVH_DTYPE_FLOAT && (dtype.bits == 32 || dtype.bits == 16);
    const int is_bfloat = dtype.code == KVH_DTYPE_BFLOAT && dtype.bits == 16;
    return dtype.lanes == 1 && (is_float || is_bfloat);
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31;
    const uint32_t mantissa = half & 1023;
    if (exponent == 0) {
        return float_of_bits(sign | bits_of_float((float)mantissa * 0x1p-24f));
    }
    return float_of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

/* To nearest, ties to even. */
static inline uint16_t half_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00);
    }
    if (magnitude >= 0x47800000) {
        return (uint16_t)(sign | 0x7c00);
    }
    if (magnitude < 0x38800000) {
        /* The steps of floats from 0.5 on are those of subnormal halves, so the addition rounds. */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f)));
    }
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

/* To nearest, ties to even. */
static inline uint16_t bfloat_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 | 64);
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Where the row of a token and head begins. `rows` is `&layer->k` or `&layer->v`. */
static inline char *row_at(const KvhLayer *layer, const KvhRows *rows, uint64_t token, uint32_t head) {
    char *base = (char *)rows->base + (int64_t)head * rows->stride_head;
    if (layer->block_size == 0) {
        return base + (int64_t)token * rows->stride_token;
    }
    const KvhBlockTable *table = &layer->table;
    int64_t block = (int64_t)(token / layer->block_size);
    if (table->data != NULL) {
        const int64_t entry = block + (int64_t)head * table->stride_head;
        if (table->dtype.bits == 64) {
            block = ((const int64_t *)table->data)[entry];
        } else if (table->dtype.code == KVH_DTYPE_UINT) {
            block = ((const uint32_t *)table->data)[entry];
        } else {
            block = ((const int32_t *)table->data)[entry];
        }
    }
    return base + block * rows->stride_block + (int64_t)(token % layer->block_size) * rows->stride_token;
}

/* Reads `rows->head_dim` elements. */
static inline void read_row(const KvhLayer *layer, const KvhRows *rows, uint64_t token, uint32_t head, float *out) {
    const char *element = row_at(layer, rows, token, head);
    for (uint32_t i = 0; i < rows->head_dim; i++, element += rows->stride_element) {
        if (rows->dtype.bits == 32) {
            memcpy(&out[i], element, sizeof out[i]);
            continue;
        }
        uint16_t bits;
        memcpy(&bits, element, sizeof bits);
        out[i] = rows->dtype.code == KVH_DTYPE_BFLOAT ? float_of_bits((uint32_t)bits << 16) : float_of_half(bits);
    }
}

/* Writes `rows->head_dim` elements. Only into rows that the host lent: a plugin never writes into the cache. */
static inline void write_row(const KvhLayer *layer, const KvhRows *rows, uint64_t token, uint32_t head,
                             const float *values) {
    char *element = row_at(layer, rows, token, head);
    for (uint32_t i = 0; i < rows->head_dim; i++, element += rows->stride_element) {
        if (rows->dtype.bits == 32) {
            memcpy(element, &values[i], sizeof values[i]);
            continue;
        }
        const uint16_t bits =
            rows->dtype.code == KVH_DTYPE_BFLOAT ? bfloat_of_float(values[i]) : half_of_float(values[i]);
        memcpy(element, &bits, sizeof bits);
    }
}

/* Whether `id` is the text `known`. */
static inline int is_id(KvhStr id, const char *known) {
    return id.length == strlen(known) && memcmp(id.data, known, id.length) == 0;
}

#endif
