/* A config of numbers. */
#ifndef CONFIG_H
#define CONFIG_H

#include "helpers.h"

/* A key of a config whose value is a number: from `least` to `most`, and whole if `whole` is not 0. */
typedef struct {
    const char *key;
    double least;
    double most;
    int whole;
    /* The default, until the key is given. */
    double value;
    int given;
} Number;

/* Reads one `key=number` or `key:number`. */
static int read_item(const char *text, Number *numbers, size_t count, KvhText *error) {
    const size_t length = strcspn(text, "=:");
    for (size_t i = 0; i < count; i++) {
        Number *number = &numbers[i];
        if (strlen(number->key) != length || strncmp(text, number->key, length) != 0 || text[length] == '\0') {
            continue;
        }
        char *end = NULL;
        const double value = strtod(text + length + 1, &end);
        const int is_number = end != text + length + 1 && *end == '\0' && value >= number->least && value <= number->most;
        if (!is_number || (number->whole && value != (double)(int64_t)value)) {
            fail(error, KVH_ERR_CONFIG, "config key `%s` has the value %s; allowed is a %snumber from %.15g to %.15g",
                 number->key, text + length + 1, number->whole ? "whole " : "", number->least, number->most);
            return 0;
        }
        if (number->given) {
            fail(error, KVH_ERR_CONFIG, "config key `%s` is given twice", number->key);
            return 0;
        }
        number->value = value;
        number->given = 1;
        return 1;
    }
    char known[128] = "";
    for (size_t i = 0; i < count && strlen(known) + strlen(numbers[i].key) + 3 < sizeof known; i++) {
        strcat(strcat(known, i > 0 ? ", " : ""), numbers[i].key);
    }
    fail(error, KVH_ERR_CONFIG, "`%s` in the config is not key=number; the keys are: %s", text, known);
    return 0;
}

/* Reads a config of numbers: `key=number,key=number` or `{"key": number, "key": number}`. Keys that are not given keep their
 * value. Gives 0, and writes `error`, when it is something else. */
static int read_numbers(KvhStr config, Number *numbers, size_t count, KvhText *error) {
    char text[512];
    if (config.length >= sizeof text) {
        fail(error, KVH_ERR_CONFIG, "the config has %llu bytes; at most %d are read", (unsigned long long)config.length,
             (int)sizeof text - 1);
        return 0;
    }
    /* Quotes, braces and spaces are left out. */
    size_t length = 0;
    for (size_t i = 0; i < config.length; i++) {
        const char c = config.data[i];
        if ((c < ' ' || c > '~') && (c == '\0' || strchr("\t\r\n", c) == NULL)) {
            fail(error, KVH_ERR_CONFIG, "the config is not ASCII text at byte %llu", (unsigned long long)i);
            return 0;
        }
        if (strchr("\"{} \t\r\n", c) == NULL) {
            text[length++] = c;
        }
    }
    text[length] = '\0';
    char *item = text;
    while (length > 0 && item != NULL) {
        char *next = strchr(item, ',');
        if (next != NULL) {
            *next++ = '\0';
        }
        if (!read_item(item, numbers, count, error)) {
            return 0;
        }
        item = next;
    }
    return 1;
}

#endif
